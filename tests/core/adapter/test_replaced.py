"""Layers of an adapted model that the user replaces: nothing of the old ones is put into the new ones."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError


def headed() -> LoraModel:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init="gaussian"), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    return lora


CALLS = {
    "set": lambda lora: lora.set_adapter("b"),
    "disable": lambda lora: lora.disable_adapter().__enter__(),
    "save": lambda lora: lora.pack("a"),
    "delete": lambda lora: lora.delete_adapter("a"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_head_of_another_shape(call):
    lora = headed()
    lora.model[2] = head = nn.Linear(6, 5)
    weight = head.weight.detach().clone()
    with pytest.raises(StateError, match=r"'2\.weight', '2\.bias' has another shape.*replaced. unload\(\)"):
        CALLS[call](lora)
    assert lora.active_adapters == ("a",)
    lora.unload()
    assert torch.equal(lora.model[2].weight, weight)
    LoraModel(lora.model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    assert lora.model(torch.zeros(3, 4)).shape == (3, 5)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda lora: lora.pack("a"), id="save"),
        pytest.param(lambda lora: lora.merge_adapter(), id="merge"),
        pytest.param(lambda lora: lora.merge_and_unload(), id="merge for good"),
    ],
)
def test_an_adapted_layer(call):
    lora = headed()
    lora.model[0] = new = nn.Linear(4, 6)
    weight = new.weight.detach().clone()
    with pytest.raises(StateError, match=r"The update of '0' by the adapter 'a' is gone: the layer was replaced"):
        call(lora)
    lora.unload()
    assert torch.equal(new.weight, weight)
    assert type(lora.model[2]) is nn.Linear
