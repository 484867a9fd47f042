"""`memory="low"`: the same gradients, with less kept."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from benchmarks.speed.measure import kept_bytes
from lora_plugins import LoraConfig, LoraModel, StateError
from tests.core.kernels.needs import needs

pytest.importorskip("lora_plugins.kernels.entries.recompute")
pytestmark = needs("recompute", "fused_linear", "fused_conv")


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT.contiguous().mT


SOURCES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "layer_norm": lambda: nn.LayerNorm(6),
    "layer_norm-no_bias": lambda: nn.LayerNorm(6, bias=False),
    "layer_norm-plain": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer_norm-transposed": lambda: nn.Sequential(Transposed(), nn.LayerNorm(6)),
    "gelu-transposed": lambda: nn.Sequential(Transposed(), nn.GELU()),
    "layer_norm-transposed-view": lambda: nn.Sequential(
        nn.Unflatten(0, (2, 4)), Transposed(), nn.LayerNorm(6), nn.Flatten(0, 1)
    ),
    "view": lambda: nn.Sequential(nn.GELU(), nn.Unflatten(0, (2, 4)), nn.Unflatten(0, (1, 2)), nn.Flatten(0, 1)),
}

sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def network(source: Callable[[], nn.Module], memory: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), source(), nn.Linear(6, 5)).double()
    config = LoraConfig(r=2, target_modules="2", init="none", memory=memory, dropout=dropout)
    LoraModel(model, config)
    return model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(model(x).sin().sum(), wanted))


@sources
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_the_gradients_are_the_same(source, dropout):
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    normal, low = network(source, "normal", dropout), network(source, "low", dropout)
    torch.testing.assert_close(run(low, x), run(normal, x), rtol=1e-12, atol=1e-12)


def test_what_was_counted_is_freed():
    x = torch.randn(8, 6, requires_grad=True)
    alive = weakref.ref(x)
    kept_bytes(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()), (x,))  # a sigmoid keeps its own output
    del x
    gc.collect()
    assert alive() is None


@sources
def test_nothing_but_what_the_frozen_model_keeps(source):
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    model = network(source, "low")
    floor = network(source, "low")
    LoraModel(floor).unload()
    floor.requires_grad_(False)
    assert kept_bytes(model, (x,)) == kept_bytes(floor, (x,)) < kept_bytes(network(source, "normal"), (x,))


def test_an_input_of_another_origin_is_kept():
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    normal, low = network(nn.Tanh, "normal"), network(nn.Tanh, "low")
    torch.testing.assert_close(run(low, x), run(normal, x), rtol=0, atol=0)


def test_a_convolution_too():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    gradients = []
    for memory in ("normal", "low"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), nn.Conv2d(4, 5, 3)).double()
        LoraModel(model, LoraConfig(r=2, target_modules=["2"], init="none", memory=memory, dropout=0.3))
        gradients.append(run(model, x))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_under_gradient_checkpointing():
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    model = network(nn.GELU, "low")
    plain = run(model, x)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    again = torch.autograd.grad(checkpointed(x).sin().sum(), wanted)
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "source", [SOURCES["gelu"], SOURCES["layer_norm"], SOURCES["view"]], ids=["gelu", "norm", "view"]
)
def test_behind_a_checkpointed_part_whose_tensors_may_be_read_once(source):
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    model = network(source, "low")
    plain = run(model, x)
    part = model[:2]
    behind = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    again = torch.autograd.grad(model[2](behind).sin().sum(), wanted)
    torch.testing.assert_close(list(again), plain, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(StateError, match="memory='low' has no second derivative"):
        torch.autograd.grad(network(nn.GELU, "low")(x).sum(), x, create_graph=True)


def test_many_gradients_at_once():
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    model, many = network(nn.GELU, "low"), torch.randn(3, 8, 5, dtype=torch.float64)
    output, wanted = model(x), [x, *(p for p in model.parameters() if p.requires_grad)]
    at_once = torch.autograd.grad(output, wanted, many, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in many]
    torch.testing.assert_close(
        list(at_once), [torch.stack(each) for each in zip(*one_by_one, strict=True)], rtol=1e-12, atol=1e-12
    )


class Copy(nn.Module):
    def forward(self, x):
        return x.clone()


WRITES = {
    "clamp": (nn.GELU, lambda x: x.clamp_(max=0.1)),
    "row": (nn.LayerNorm, lambda x: x[0].zero_()),
    "activation": (nn.Hardswish, lambda x: torch.nn.functional.silu(x, inplace=True)),
    "after_one_in_place": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.SiLU(inplace=True)), lambda x: x.mul_(2)),
    "of_a_copy": (lambda: nn.Sequential(Copy(), nn.SiLU()), lambda x: x.mul_(2)),
}


@pytest.mark.parametrize(("before", "write"), WRITES.values(), ids=WRITES)
def test_an_input_that_was_written_into_is_kept(before, write):
    gradients = []
    for memory in ("normal", "low"):
        torch.manual_seed(0)
        model = nn.Sequential(before(6) if before is nn.LayerNorm else before(), nn.Linear(6, 4)).double()
        LoraModel(model, LoraConfig(r=2, target_modules=["1"], init="none", memory=memory))
        x = model[0](torch.randn(8, 6, dtype=torch.float64, requires_grad=True))
        with torch.no_grad():
            write(x)
        gradients.append(torch.autograd.grad(model[1](x).square().sum(), model[1].lora_A.default)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_normalization_whose_mean_is_in_half_precision_is_not_computed_again():
    gradients = []
    for memory in ("normal", "low"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 32)).bfloat16()
        LoraModel(model, LoraConfig(r=4, target_modules=["1"], init="none", memory=memory))
        x = (torch.randn(64, 256) + 50).bfloat16().requires_grad_()
        gradients.append(torch.autograd.grad(model(x).square().sum(), model[1].lora_A.default)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.ReLU6], ids=lambda kind: kind.__name__)
def test_the_output_of_an_activation_in_place_is_not_kept(activation):
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    models = {}
    for memory in ("normal", "low"):
        torch.manual_seed(0)
        models[memory] = nn.Sequential(nn.BatchNorm1d(6), activation(inplace=True), nn.Linear(6, 4)).double()
        LoraModel(models[memory], LoraConfig(r=2, target_modules=["2"], init="none", memory=memory))
    torch.testing.assert_close(run(models["low"], x), run(models["normal"], x), rtol=1e-12, atol=1e-12)
    assert kept_bytes(models["low"], (x,)) == kept_bytes(models["normal"], (x,)) - x.nbytes
