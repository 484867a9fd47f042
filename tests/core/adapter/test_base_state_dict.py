"""State dicts of the base that are loaded into an adapted model, as torch and others load them."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError


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


@pytest.mark.parametrize("waiting", [False, True], ids=["in place", "waiting"])
def test_what_was_loaded_may_change_afterwards(waiting):
    """As where a state dict is the running average of another model."""
    model, state = model_of(0), model_of(1).state_dict()
    lora = adapted(model)
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    lora.set_adapter("other" if waiting else "default")
    model.load_state_dict(state)
    expected = state["1.weight"].clone()
    state["1.weight"].zero_()
    lora.set_adapter("default")
    assert torch.equal(model[1].weight, expected)
    lora.unload()
    assert torch.equal(model[1].weight, expected)


def tied(seed):
    model = nn.ModuleDict({"first": model_of(seed)[1], "again": nn.Linear(6, 2).double(), "more": nn.Linear(6, 6)})
    model["again"].weight = model["first"].weight
    return model


def test_a_trained_tensor_keeps_its_value_under_all_of_its_names():
    model = tied(0)
    LoraModel(model, LoraConfig(r=2, target_modules=["more"], modules_to_save=["first"]))
    with torch.no_grad():
        own = model["first"].weight.add_(1).clone()
    model.load_state_dict(tied(1).state_dict())
    assert torch.equal(model["first"].weight, own)


def test_a_changed_base_is_refused_under_any_of_its_names():
    model = tied(0)
    LoraModel(model, LoraConfig(r=2, target_modules=["first", "again"], init="pissa"))
    with pytest.raises(StateError, match="'pissa', which changed the base"):
        model.load_state_dict({"again.weight": torch.zeros(2, 6)}, strict=False)


@pytest.mark.parametrize("part", [False, True], ids=["the model", "a part of it"])
def test_modules_may_have_methods_of_torchs_names(part):
    """As the models of otx, which register a hook of their own for the classes of a checkpoint."""

    class Named(nn.Sequential):
        def register_load_state_dict_pre_hook(self, model_classes, ckpt_classes):
            raise AssertionError

        def register_forward_pre_hook(self, stage):
            raise AssertionError

    named = [Named(*model_of(seed)) for seed in range(2)]
    model, other = (nn.ModuleDict({"net": net}) for net in named) if part else named
    lora = LoraModel(model, LoraConfig(r=2, target_modules="all", init="gaussian"))
    named[0].load_state_dict(named[1].state_dict())
    lora.unload()
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
