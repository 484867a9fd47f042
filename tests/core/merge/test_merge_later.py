"""What a training that ends with a merge is asked before it begins."""

import pytest
from torch import nn

from lora_plugins import LoraConfig, LoraModel, MergeError
from lora_plugins.merge import check_merge_later


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("adapted", [False, True], ids=["planned", "adapted"])
def test_a_weight_that_another_layer_has_too(adapted):
    model, config = tied(), LoraConfig(r=2, target_modules=["embed"])
    plan = LoraModel.plan(model, config)
    if adapted:
        LoraModel(model, config)
    with pytest.raises(MergeError, match=r"'embed\.weight' is the same tensor as 'head\.weight'"):
        check_merge_later(model, dequantize=False, otherwise="", plan=None if adapted else plan)


def test_one_that_both_layers_adapt():
    model, config = tied(), LoraConfig(r=2, target_modules="all")
    plan = LoraModel.plan(model, config)
    assert check_merge_later(model, dequantize=False, otherwise="", plan=plan) == []
    LoraModel(model, config)
    assert check_merge_later(model, dequantize=False, otherwise="") == []


def test_an_adapter_that_does_not_act_is_not_merged():
    model = tied()
    lora = LoraModel(model, LoraConfig(r=2, target_modules="all"))
    lora.add_adapter("waits", LoraConfig(r=2, target_modules=["embed"]))
    assert check_merge_later(model, dequantize=False, otherwise="") == []
