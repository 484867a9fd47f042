"""Whatever looks through a layer sees the law: compilers, transforms, tracers, dual numbers, checkpointing."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_plugins import LoraConfig, LoraModel

pytestmark = pytest.mark.usefixtures("compiler_as_new")

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

MODELS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(3, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), lambda: torch.randn(3, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: torch.randn(3, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (3, 4))),
}

models = pytest.mark.parametrize("name", MODELS)
floating = pytest.mark.parametrize("name", [name for name in MODELS if name != "embedding"])


def adapted(name: str, **fields) -> tuple[nn.Module, Tensor]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    LoraModel(model, LoraConfig(r=2, alpha=3, init="none", **fields))
    x = inputs()
    return model, x.double() if x.is_floating_point() else x


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(output: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(output.sin().sum(), [*trained(model).values()]))


@models
def test_compile_of_one_graph(name):
    model, x = adapted(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)
    torch.testing.assert_close(gradients(compiled(x), model), gradients(model(x), model), **TIGHT)


@floating
def test_compile_with_dropout(name):
    model, x = adapted(name, dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with LoraModel(model).disable_adapter():
        base = model(x)
    model.eval()
    branch = model(x) - base
    model.train()
    torch.manual_seed(0)
    mean = torch.stack([compiled(x) - base for _ in range(200)]).mean(0)
    assert (mean - branch).abs().mean() < 0.3 * branch.abs().mean()


@models
def test_export(name):
    model, x = adapted(name)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x), **TIGHT)


@models
def test_functional_gradients(name):
    model, x = adapted(name)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sin().sum()

    found = torch.func.grad(loss)({key: value.detach() for key, value in trained(model).items()})
    torch.testing.assert_close([*found.values()], gradients(model(x), model), **TIGHT)


@floating
def test_vmap_over_a_batch(name):
    model, x = adapted(name)
    torch.testing.assert_close(torch.func.vmap(lambda row: model(row[None])[0])(x), model(x), **TIGHT)


@floating
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch uses it itself
def test_dual_numbers(name):
    model, x = adapted(name)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    _, wanted = torch.autograd.functional.jvp(model, x, tangent)
    torch.testing.assert_close(found, wanted, **TIGHT)


@models
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_jit_trace(name):
    model, x = adapted(name)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x), **TIGHT)
    # coremltools cannot read it
    assert not list(traced.inlined_graph.findAllNodes("aten::movedim"))


@floating
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no_dropout", "dropout"])
def test_gradient_checkpointing(name, reentrant, dropout):
    model, x = adapted(name, dropout=dropout)
    x.requires_grad_()
    torch.manual_seed(3)
    wanted = gradients(model(x), model)
    torch.manual_seed(3)
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    output.sin().sum().backward()
    torch.testing.assert_close([p.grad for p in trained(model).values()], wanted, **TIGHT)


@floating
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gradient_checkpointing_computes_a_part_again_once(name, variant):
    model, x = adapted(name, variant=variant)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(name))
    torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert len(calls) == 2


@models
def test_a_copy_trains_apart(name):
    model, x = adapted(name)
    twin = copy.deepcopy(model)
    twin(x).sum().backward()
    assert all(p.grad is None for p in trained(model).values())
    assert all(p.grad is not None for p in trained(twin).values())


@floating
@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}], ids=["plain", "dora"])
def test_many_gradients_at_once(name, fields):
    model, x = adapted(name, **fields)
    output = model(x.requires_grad_())
    wanted = [x, *trained(model).values()]
    many = torch.randn(3, *output.shape, dtype=x.dtype)
    at_once = torch.autograd.grad(output, wanted, many, is_grads_batched=True, retain_graph=True)
    assert not any(gradient.requires_grad for gradient in at_once)
    one_by_one = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in many]
    torch.testing.assert_close(list(at_once), [torch.stack(each) for each in zip(*one_by_one, strict=True)], **TIGHT)


AGAIN = {
    "linear": (lambda: nn.Linear(4, 4), lambda: torch.randn(3, 4)),
    "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: torch.randn(3, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 4, 1), lambda: torch.randn(3, 4, 5, 5)),
}


def called_again(name: str, variant: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns the parameters of a layer, its output from its own output, and the same in plain operations."""
    make, inputs = AGAIN[name]
    torch.manual_seed(0)
    layer = make().double()
    weight, x = layer.weight.detach().clone(), inputs().double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    LoraModel(model, LoraConfig(r=2, alpha=3, init="gaussian", variant=variant))
    parameters = [*trained(model).values()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)

    A, B, *magnitude = parameters
    matrix = weight.flatten(1) + 1.5 * B @ A
    if magnitude:
        matrix = magnitude[0].view(-1, 1) * matrix / matrix.norm(dim=1, keepdim=True).detach()
    tensors = {"weight": matrix.view(weight.shape), "bias": layer.bias.detach()}
    plain = make().double()
    expected = torch.func.functional_call(plain, tensors, torch.func.functional_call(plain, tensors, x).tanh())
    return parameters, model(x), expected


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", AGAIN)
def test_second_derivatives_of_a_layer_that_is_called_on_its_own_output(name, variant):
    parameters, *outputs = called_again(name, variant)

    def derivatives(output: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(output.sin().sum(), parameters, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.cos().sum() for each in first), parameters)]

    found, expected = map(derivatives, outputs)
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", AGAIN)
def test_many_gradients_at_once_of_a_layer_that_is_called_on_its_own_output(name, variant):
    parameters, *outputs = called_again(name, variant)
    many = torch.randn(5, *outputs[0].shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad(each, parameters, many, is_grads_batched=True) for each in outputs)
    torch.testing.assert_close(found, expected, **TIGHT)
