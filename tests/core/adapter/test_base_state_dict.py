"""State dicts of the base that are loaded into an adapted model, as torch and others load them."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()


def adapted(model):
    return LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init="gaussian"))


def load_as_mmcv(module, state_dict, prefix=""):
    """Gives every module the whole state dict; torch gives it its own part."""
    module._load_from_state_dict(state_dict, prefix, {}, True, [], [], [])
    for name, child in module.named_children():
        load_as_mmcv(child, state_dict, f"{prefix}{name}.")


def test_what_is_beside_the_model_is_not_taken_for_its_base():
    whole, other = (nn.ModuleDict({"net": model_of(seed), "1": nn.Linear(6, 2).double()}) for seed in range(2))
    lora = adapted(whole["net"])
    load_as_mmcv(whole, other.state_dict())
    lora.unload()
    for key, value in other.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value)


def test_keys_that_the_model_lacks_are_told_as_ever():
    model, state = model_of(0), {**model_of(1).state_dict(), "other": torch.zeros(1)}
    adapted(model)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["other"]


def test_a_head_of_another_shape_leaves_the_base_its_own():
    """As where the classes of a checkpoint are others: torch refuses it when the other tensors have been loaded."""
    model = model_of(0)
    before = model[1].weight.detach().clone()
    lora = adapted(model)
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        model.load_state_dict({**model_of(1).state_dict(), "1.weight": torch.zeros(3, 6)})
    lora.unload()
    assert torch.equal(model[1].weight, before)


def test_a_layer_under_two_names_loads_strictly():
    def build(seed):
        torch.manual_seed(seed)
        layer = nn.Linear(4, 4)
        return nn.ModuleDict({"first": layer, "part": nn.Sequential(layer, nn.Linear(4, 4))})

    model, other = build(0), build(1)
    lora = LoraModel(model, LoraConfig(r=2, target_modules="all"))
    model.load_state_dict(other.state_dict())
    model["part"].load_state_dict(build(2)["part"].state_dict())
    lora.unload()
    assert torch.equal(model["first"].weight, build(2)["first"].weight)
