"""Layers that are built when there are adapters already: they are the author's own until an adapter takes them."""

import pytest
from torch import nn

from lora_plugins import LoraConfig, LoraModel


def with_a_later_layer():
    """An adapted model, and a layer that was built when it was adapted already."""
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4)).double(), LoraConfig(r=2, target_modules=["0"]), "a")
    lora.model.append(nn.Linear(4, 3).double())
    return lora


def add_second(lora, **config):
    lora.add_adapter("b", LoraConfig(r=1, **config))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    "call",
    [
        lambda lora: add_second(lora, target_modules=["0"]),
        lambda lora: lora.set_adapter("a", trainable=False),
        lambda lora: lora.unload(),
    ],
    ids=["add", "set", "unload"],
)
def test_what_is_built_later_is_trained_as_its_author_says(call, frozen):
    lora = with_a_later_layer()
    lora.model[1].requires_grad_(not frozen)
    call(lora)
    assert [p.requires_grad for p in lora.model[1].parameters()] == [not frozen] * 2


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("config", [{"target_modules": ["1"]}, {"target_modules": ["0"], "modules_to_save": ["1"]}])
def test_what_is_built_later_is_given_back_by_unload(config, frozen):
    lora = with_a_later_layer()
    later = lora.model[1]
    later.requires_grad_(not frozen)
    add_second(lora, **config)
    assert not later.bias.requires_grad
    lora.set_adapter("b")
    assert later.bias.requires_grad == ("modules_to_save" in config)
    lora.delete_adapter("b")
    assert not later.bias.requires_grad
    lora.unload()
    assert [p.requires_grad for p in lora.model.parameters()] == [True, True, not frozen, not frozen]
