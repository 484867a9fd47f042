"""Convolutions whose `_conv_forward` somebody replaced, before they were adapted or after, as for seamless pictures."""

import copy

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn.functional import conv2d, pad

from lora_plugins import LoraConfig, LoraModel, StateError
from tests.core.kernels.graphs import compiled
from tests.core.kernels.needs import needs


def seamless(x, weight, bias):
    """Goes round in one direction, and pads with zeros in the other."""
    return conv2d(pad(pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), weight, bias)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()


def adapted(when, **fields):
    model = build()
    if when == "before":
        model[0]._conv_forward = seamless
    lora = LoraModel(model, LoraConfig(r=2, **fields))
    nn.init.normal_(model[0].lora_B["default"])
    if when == "after":
        model[0]._conv_forward = seamless
    return lora


def updated(lora):
    """The untouched layer with the weight that is meant."""
    merged = copy.deepcopy(lora.model)
    merged[0].__dict__.pop("_conv_forward")
    merged = LoraModel(merged).merge_and_unload()
    merged[0]._conv_forward = seamless
    return merged


@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}], ids=["lora", "dora"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_is_used_and_learned_through(when, fields):
    lora, x = adapted(when, **fields), torch.randn(2, 3, 6, 6).double()
    expected = updated(lora)
    outputs = [each(x) for each in (lora.model, expected)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    if not fields:  # the gradient of DoRA holds its norm constant
        for output in outputs:
            output.square().sum().backward()
        (layer,) = lora.plans["default"].layers
        A = lora.model[0].lora_A["default"].detach()
        gradient = layer.scaling * expected[0].weight.grad.flatten(1) @ A.T
        torch.testing.assert_close(lora.model[0].lora_B["default"].grad, gradient, rtol=1e-10, atol=1e-10)
    lora.unload()
    torch.testing.assert_close(lora.model(x), seamless(x, *lora.model[0].parameters()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_dropout_acts_on_the_update_alone(when):
    lora, x = adapted(when, dropout=0.5), torch.randn(2, 3, 6, 6).double()
    with lora.disable_adapter():
        base = lora.model(x)
    expected = updated(lora).requires_grad_(False)(x) - base
    torch.manual_seed(1)
    mean = torch.stack([lora.model(x).detach() - base for _ in range(4000)]).mean(0)
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("when", ["before", "after"])
def test_rows_with_adapters_of_their_own_are_refused(when):
    lora = adapted(when)
    lora.model.eval()
    match = "cannot mix adapters in one batch: '0': somebody replaced _conv_forward"
    with pytest.raises(StateError, match=match), lora.mixed_batch(["default", None]):
        pass


def given_back(layer):
    layer._conv_forward = seamless
    layer._conv_forward = nn.Conv2d._conv_forward.__get__(layer)


since_2_13 = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13.0.dev0"), reason="torch 2.11 compiles it as replaced"
)
KEPT = {"never": lambda layer: None, "given_back": pytest.param(given_back, marks=since_2_13)}


@needs("fused_conv")
@pytest.mark.usefixtures("compiler_as_new")
@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_one_that_was_not_replaced_is_compiled_as_the_operator(change):
    model = build()
    LoraModel(model, LoraConfig(r=2, dropout=0.3, init="none"))
    change(model[0])
    output = compiled(model, expected=1)(torch.randn(2, 3, 6, 6).double())
    assert output.shape == (2, 4, 6, 6)


@pytest.mark.usefixtures("compiler_as_new")
@pytest.mark.parametrize("when", ["before", "after"])
def test_is_used_by_compilers(when):
    model, x = adapted(when).model, torch.randn(2, 3, 6, 6).double()
    torch.testing.assert_close(compiled(model, expected=0)(x), model(x), rtol=0, atol=1e-12)
