"""The operator that compilers are given: what eager mode computes, in one graph, and not where others look through."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_plugins.kernels import disabled_kernels
from tests.core.kernels.graphs import EQUAL, both, compiled
from tests.core.kernels.linear_cases import MANY, UNUSUAL, drops, law, linear, seeded, shapes, tensors
from tests.core.kernels.needs import needs
from tests.slow import slow_but

pytestmark = [needs("fused_linear"), pytest.mark.usefixtures("compiler_as_new")]
INDUCTORS_OWN = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def call(dropout: float):
    """As `seeded`, whose seed a compiler cannot trace."""

    def compute(*inputs: Tensor) -> Tensor:
        return linear(*inputs, 1.7, dropout)

    return compute


@shapes
@drops
@pytest.mark.parametrize(
    "dtype", slow_but([torch.float64, torch.float32, torch.bfloat16], [torch.float64, torch.bfloat16]), ids=str
)
def test_outputs_and_gradients_are_those_of_eager_mode(lead, outputs, r, dropout, dtype):
    torch.testing.assert_close(*both(call(dropout), tensors(lead, outputs, r, dtype)), **EQUAL)


@shapes
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_under_autocast(lead, outputs, r, base):
    x, weight, bias, A, B = tensors(lead, outputs, r, torch.float32)
    weight, bias = (tensor.detach().to(base).requires_grad_() for tensor in (weight, bias))
    torch.testing.assert_close(*both(call(0.3), [x, weight, bias, A, B], dtype=torch.bfloat16), **EQUAL)


@shapes
def test_under_autocast_without_dropout_a_graph_has_ordinary_operations(lead, outputs, r):
    inputs = tensors(lead, outputs, r, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(call(0.0), expected=0)(*inputs)
    expected = law(*inputs)
    assert output.dtype == torch.bfloat16
    # bfloat16 has 8 bits; sums of some products keep about 6 of them
    assert (output.float() - expected).norm() < 0.02 * expected.norm()


@shapes
@drops
def test_wide_factors_of_a_base_in_half_precision(lead, outputs, r, dropout):
    x, weight, bias, *factors = tensors(lead, outputs, r, torch.float32)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    torch.testing.assert_close(*both(call(dropout), [*half, *factors]), **EQUAL)


@shapes
@pytest.mark.parametrize("needed", slow_but(range(5), [0, 3]), ids=["x", "weight", "bias", "A", "B"])
def test_one_gradient_alone(lead, outputs, r, needed):
    inputs = [tensor.detach().requires_grad_(i == needed) for i, tensor in enumerate(tensors(lead, outputs, r))]
    torch.testing.assert_close(*both(call(0.3), inputs, [needed]), **EQUAL)


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
@drops
def test_unusual_inputs(make, dropout):
    _, *others = tensors(MANY, 9, 1)
    torch.testing.assert_close(*both(call(dropout), [make().double().requires_grad_(), *others]), **EQUAL)


def test_a_weight_that_is_transposed_in_memory():
    x, weight, *others = tensors(MANY, 9, 1)
    torch.testing.assert_close(
        *both(call(0.0), [x, weight.detach().T.contiguous().T.requires_grad_(), *others]), **EQUAL
    )


def test_without_bias_and_without_gradients():
    x, weight, _, A, B = tensors(MANY, 9, 1)
    with torch.no_grad():
        y = compiled(lambda: linear(x, weight, None, A, B, 1.7, 0.0))()
    torch.testing.assert_close(y, law(x, weight, None, A, B), **EQUAL)


@pytest.mark.parametrize("rows", [3, 5, 60])
def test_one_graph_serves_batches_of_any_size(rows):
    _, *others = tensors(MANY, 9, 1)
    run = torch.compile(call(0.0), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (2, rows):
            x = torch.randn(count, 6, dtype=torch.float64)
            torch.testing.assert_close(run(x, *others), law(x, *others), **EQUAL)


@drops
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@INDUCTORS_OWN
def test_the_backward_has_the_masks_of_the_forward(dropout, checkpointed, backend):
    x, weight, bias, A, B = (tensor.detach() for tensor in tensors(MANY, 9, 1))
    A, B = A.requires_grad_(), B.requires_grad_()

    def compute(*inputs: Tensor) -> Tensor:
        if checkpointed:
            return checkpoint(call(dropout), *inputs, use_reentrant=False)
        return call(dropout)(*inputs)

    output = torch.compile(compute, backend=backend, fullgraph=True)(x, weight, bias, A, B)
    update = output - F.linear(x, weight, bias)
    dA, dB = torch.autograd.grad(update.square().sum(), [A, B])
    # The update is linear in either factor, which the masks of forward and backward have to agree for.
    for factor, gradient in ((A, dA), (B, dB)):
        torch.testing.assert_close((factor * gradient).sum(), 2 * update.square().sum(), rtol=1e-10, atol=0)


@INDUCTORS_OWN
def test_masks_are_new_in_each_call():
    inputs = tensors(MANY, 9, 1)
    run = torch.compile(lambda *inputs: (call(0.5)(*inputs), call(0.5)(*inputs)), fullgraph=True)
    outputs = [*run(*inputs), *run(*inputs)]
    assert all((one != other).any() for i, one in enumerate(outputs) for other in outputs[:i])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15 itself
@drops
def test_the_operator_is_what_torch_expects_of_one(dropout):
    x, weight, bias, A, B = tensors(MANY, 9, 1)
    seed = torch.tensor(5) if dropout else None
    torch.library.opcheck(torch.ops.lora_plugins.linear, (x, weight, bias, A, B, seed, 1.7, dropout))


TRANSFORMS = {
    "vmap": lambda x, *others: torch.func.vmap(lambda row: linear(row, *others, 1.7, 0.0))(x),
    "jvp": lambda x, *others: torch.func.jvp(lambda x: linear(x, *others, 1.7, 0.0), (x,), (x,)),
    "grad": lambda x, *others: torch.func.grad(lambda x: linear(x, *others, 1.7, 0.0).sin().sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch uses it itself
def test_transforms_inside_of_a_graph_look_through_ordinary_operations(transform):
    inputs = [tensor.detach() for tensor in tensors(MANY, 9, 1)]
    torch.testing.assert_close(compiled(transform, expected=0)(*inputs), transform(*inputs), **EQUAL)


def test_without_kernels_a_graph_has_ordinary_operations():
    inputs = tensors(MANY, 9, 1)
    with disabled_kernels("fused_linear"):
        torch.testing.assert_close(compiled(call(0.0), expected=0)(*inputs), law(*inputs), **EQUAL)


def test_an_exported_program_has_ordinary_operations():
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return linear(*inputs, 1.7, 0.0)

    inputs = tuple(tensor.detach() for tensor in tensors(MANY, 9, 1))
    program = torch.export.export(Layer(), inputs)
    assert "lora_plugins" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), law(*inputs), **EQUAL)
    torch.testing.assert_close(seeded(0.0)(*inputs), law(*inputs), **EQUAL)
