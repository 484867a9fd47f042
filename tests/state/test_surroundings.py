"""In every state, a model computes the same however it is called: compiled, checkpointed, in inference mode."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lora_plugins import LoraConfig, LoraModel, StateError
from tests.slow import slow_but
from tests.state.checks import drops, tolerance
from tests.state.draw import draw_blocks, draw_step
from tests.state.machine import opened
from tests.state.plugins import registry
from tests.state.rules import Step
from tests.state.zoo import BLOCKS, batch, build

Outputs = dict[str, Tensor]

STEPS = 20


def compiled(model: nn.Module) -> Callable[..., Outputs]:
    return torch.compile(model, backend="eager")  # aot_eager takes no batch norm of transposed inputs on a CPU


def checkpointed(model: nn.Module) -> Callable[..., Outputs]:
    return lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)


def called_with_own_tensors(model: nn.Module) -> Callable[..., Outputs]:
    def call(*inputs: Tensor) -> Outputs:
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        return functional_call(model, tensors, inputs)

    return call


def in_inference_mode(model: nn.Module) -> Callable[..., Outputs]:
    return torch.inference_mode()(model)


def differentiated_again(model: nn.Module) -> Callable[..., Outputs]:
    return model


# Of a tensor that is computed before a compiled part, torch asks whether it has a gradient. It hides its own warning of
# that by a way that does not reach warnings that are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SURROUNDINGS = {
    each.__name__: each
    for each in (compiled, checkpointed, called_with_own_tensors, in_inference_mode, differentiated_again)
}


@pytest.fixture(autouse=True)
def many_graphs():
    """Each state is a graph of its own; beyond a limit the compiler would call the model itself."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=200):
        yield
    torch.compiler.reset()


def results(
    call: Callable[..., Outputs], model: nn.Module, inputs: tuple[Tensor, ...], create_graph: bool = False
) -> list[Tensor] | str:
    """Outputs, and the gradients of what is trained, zeros for what has none; what is said where it is refused."""
    try:
        outputs = list(call(*inputs).values())
    except StateError as error:
        return str(error)
    loss = sum(output.double().square().sum() for output in outputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained or not loss.requires_grad:
        return outputs
    options = {"allow_unused": True, "materialize_grads": True, "create_graph": create_graph}
    found = [*outputs, *torch.autograd.grad(loss, trained, **options)]
    return [tensor.detach() for tensor in found]  # torch swaps no tensors that a graph holds


def compare(found: list[Tensor] | str, wanted: list[Tensor] | str, step: Step) -> None:
    if isinstance(wanted, str):
        assert found == wanted, step
        return
    # Walks cast models now and then, to half precision too, in which a compiler may sum up in another order.
    allowed = max(tolerance(tensor.dtype, size=8) for tensor in wanted)
    largest = max(float(tensor.detach().abs().max()) for tensor in wanted)
    torch.testing.assert_close(
        found, wanted, rtol=allowed, atol=allowed * largest, msg=lambda text: f"after {step}: {text}"
    )


def walk(surrounding: str, seed: str) -> None:
    random = Random(seed)
    blocks = draw_blocks(random)
    model, call = None, None
    with opened(blocks, torch.float64, random.randrange(1000)) as machine:
        for _ in range(STEPS):
            step = draw_step(random, machine)
            machine.do(step, compare=False)
            if drops(machine.reference) or machine.reference.moves() or machine.pending:
                continue  # each call draws other numbers, moves statistics, or changes what a backward waits for
            if machine.model is not model:
                model, call = machine.model, SURROUNDINGS[surrounding](machine.model)
            again = surrounding == "differentiated_again"
            if again and any(each.spec.memory == "low" for each in machine.reference.adapters.values()):
                continue  # it is refused
            with torch.set_grad_enabled(surrounding != "in_inference_mode"):
                wanted = results(machine.model, machine.model, machine.inputs)
                found = results(call, machine.model, machine.inputs, create_graph=again)
            compare(found, wanted, step)


COMPILED = [block for block in BLOCKS if block not in ("recurrent", "recurrent_gated")]  # torch compiles neither


@pytest.mark.parametrize("block", slow_but(COMPILED, COMPILED[::3]))
def test_an_adapted_block_is_as_many_graphs_as_before(block):
    def graphs() -> int:
        torch.compiler.reset()
        return torch._dynamo.explain(model)(*batch(torch.float32)).graph_count

    model = build((block,), torch.float32)
    before = graphs()
    LoraModel(model, LoraConfig(r=2, init="none"), registry=registry())
    assert graphs() == before


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_some_walks(surrounding):
    walk(surrounding, "some.0")


@pytest.mark.slow
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("run", range(60))
def test_many_walks(surrounding, run):
    walk(surrounding, f"many.{run}")
