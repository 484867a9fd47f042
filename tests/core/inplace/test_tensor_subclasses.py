"""Inputs of classes that extend `torch.Tensor`: an adapted layer is one operation for them, as the untouched one."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel


class Labeled(torch.Tensor):
    """Keeps a label through operations, counts them, and has methods of its own that need the label."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        result = super().__torch_function__(func, types, args, kwargs or {})
        labels = [each.label for each in args if isinstance(each, Labeled) and hasattr(each, "label")]
        if isinstance(result, Labeled) and labels:
            result.label = labels[0]
        return result

    def to(self, *args, **kwargs):
        raise AssertionError("a method of the class was called")

    clone = detach = contiguous = movedim = view = reshape = to


class Points:
    """Wraps a tensor without being one, and hands it to whatever is called with it."""

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*(each.values if isinstance(each, Points) else each for each in args), **kwargs or {})


def _labeled(x):
    result = x.clone().as_subclass(Labeled)
    result.label = "pixels"
    return result


_LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "conv": (nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
    "conv-1x1": (nn.Conv2d(3, 4, 1), (2, 3, 8, 8)),
    "conv-depthwise": (nn.Conv2d(3, 3, 3, groups=3), (2, 3, 8, 8)),
    "conv-transposed": (nn.ConvTranspose2d(3, 4, 2), (2, 3, 8, 8)),
}
_OPTIONS = {"plain": {}, "dropout": {"dropout": 0.5}, "low-memory": {"memory": "low"}}


@pytest.fixture(params=_LAYERS.values(), ids=_LAYERS)
def case(request):
    layer, shape = request.param
    torch.manual_seed(0)
    return nn.Sequential(copy.deepcopy(layer).double()), torch.randn(shape, dtype=torch.float64)


def _output_and_gradients(model, x):
    model.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    y.sum().backward()
    return y, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_computes_what_it_computes_of_the_plain_tensor(case, options, training):
    model, x = case
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none", **options))
    model.train(training)
    expected, gradients = _output_and_gradients(model, x)

    y, found = _output_and_gradients(model, _labeled(x))

    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        assert type(gradient) is torch.Tensor
        assert torch.equal(gradient, gradients[name])


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize(
    "case", [_LAYERS["linear"], _LAYERS["conv"], _LAYERS["conv-1x1"]], ids=["linear", "conv", "1x1"], indirect=True
)
def test_computes_what_it_computes_of_the_tensor_that_is_wrapped(case, options):
    model, x = case
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none", **options))
    expected, gradients = _output_and_gradients(model, x)

    y, found = _output_and_gradients(model, Points(x))

    assert torch.equal(y, expected)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in found.items())


@pytest.mark.parametrize("surroundings", [nullcontext(), torch.device("cpu")], ids=["alone", "default device"])
def test_is_one_operation_of_the_class(case, surroundings):
    model, x = case
    x = _labeled(x)
    before = Labeled.calls
    untouched = model(x)
    operations = Labeled.calls - before
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none"))

    before = Labeled.calls
    with surroundings:
        y = model(x)

    assert Labeled.calls - before == operations
    assert type(y) is type(untouched) is Labeled
    assert y.label == untouched.label == "pixels"


def test_has_second_derivatives(case):
    model, x = case
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none"))

    def second(x):
        (gradient,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0].as_subclass(torch.Tensor)

    expected = second(x.clone().requires_grad_())

    assert torch.equal(second(_labeled(x).requires_grad_()), expected)


@pytest.mark.parametrize("case", [_LAYERS["linear"], _LAYERS["conv"]], ids=["linear", "conv"], indirect=True)
def test_serves_mixed_batches(case):
    model, x = case
    lora = LoraModel(model, LoraConfig(r=2, target_modules="all", init="none"), "one")
    lora.add_adapter("other", LoraConfig(r=2, target_modules="all", init="none"))
    model.eval()
    rows = ["one", "other", None, "one"][: len(x)]
    with lora.mixed_batch(rows):
        expected = model(x)
        y = model(_labeled(x))

    assert type(y) is Labeled
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
