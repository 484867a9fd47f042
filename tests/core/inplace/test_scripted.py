"""TorchScript: modules of it in a model are not adapted, and an adapted model is not compiled to it."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError, TargetError

X = torch.ones(2, 4)


def build():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated, and still in models
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        traced = torch.jit.trace(nn.Linear(4, 4), X)
    return nn.ModuleDict({"body": nn.Linear(4, 4), "scripted": scripted, "traced": traced}).eval()


def run(model):
    return model["traced"](model["scripted"](model["body"](X)))


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"norm": "track"}], ids=["plain", "biases", "track"])
def test_the_other_layers_are_adapted(fields, tmp_path):
    model = build()
    base = run(model)
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["body"], init="none", **fields))
    output = run(model)
    assert not torch.equal(output, base)
    output.sum().backward()
    assert model["body"].lora_A["default"].grad is not None
    with lora.disable_adapter():
        assert torch.equal(run(model), base)
    lora.save_adapter(tmp_path)
    again = build()
    LoraModel.load_adapter(again, tmp_path)
    assert torch.equal(run(again), output)
    lora.merge_adapter()
    torch.testing.assert_close(run(model), output)
    lora.unload()
    assert torch.equal(run(model), base)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_change_that_is_refused_leaves_it_as_it_was():
    model = build()
    before = run(model)
    with pytest.raises(TargetError, match="which no plugin adapts"):
        LoraModel(model, LoraConfig(r=2, target_modules=["body", "0"]))
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("acts", [True, False], ids=["acting", "in a block"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_an_adapted_model_is_not_compiled(acts, untouched):
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), LoraConfig(r=2, init="none"), "task")
    expected = lora.model(X)
    refused = pytest.raises(StateError, match=r"torch.jit.script cannot .* have 'task'. Merge them .* merge_and_unload")
    with nullcontext() if acts else lora.disable_adapter(), untouched(lora.model), refused:
        torch.jit.script(lora.model)
    torch.testing.assert_close(torch.jit.script(lora.merge_and_unload())(X), expected)
