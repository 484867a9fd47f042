"""Merging where the base is stored in fewer bytes, and what unloading leaves."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, MergeError, StateError
from lora_plugins.inplace import StoredWeight


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 3))


def adapted(scale=0.1, **fields):
    model = build()
    options = {"r": 2, "modules_to_save": ["4"], "quantize": "nf4", "quantize_options": {"min_size": 0}}
    lora = LoraModel(model, LoraConfig(**{**options, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return lora


def output(model):
    return model.eval()(torch.linspace(-1, 1, 5 * 64).reshape(5, 64)).detach()


def stored(model):
    return [name for name, module in model.named_modules() if isinstance(module, StoredWeight)]


def test_merging_for_now_is_exact_and_taken_back_bit_for_bit():
    lora = adapted()
    before, bits = output(lora.model), {key: value.clone() for key, value in lora.model.state_dict().items()}
    assert lora.merge_adapter().worst < 1e-3
    torch.testing.assert_close(output(lora.model), before)
    lora.unmerge_adapter()
    assert torch.equal(output(lora.model), before)
    assert all(torch.equal(value, bits[key]) for key, value in lora.model.state_dict().items())


@pytest.mark.parametrize("first", ["unmerged", "merged"])
def test_merging_for_good_into_stored_weights_is_refused_with_the_way_out(first, untouched):
    lora = adapted()
    if first == "merged":
        lora.merge_adapter()
    with (
        untouched(lora.model),
        pytest.raises(
            MergeError, match=r"would lose \d+% of the update of '\d.weight'.*in 2 of 2 stored.*dequantize=True"
        ),
    ):
        lora.merge_and_unload()
    expected = output(lora.model)
    model = lora.merge_and_unload(dequantize=True)
    torch.testing.assert_close(output(model), expected)
    assert not stored(model)
    assert list(model.state_dict()) == list(build().state_dict())
    assert [type(layer) for layer in model] == [type(layer) for layer in build()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_large_update_into_8_bits_is_stored_again():
    lora = adapted(scale=1.0, quantize="int8")
    expected = output(lora.model)
    model = lora.merge_and_unload()
    assert stored(model) == ["0.weight_stored", "2.weight_stored"]
    assert not [key for key in model.state_dict() if "lora" in key]
    assert float((output(model) - expected).norm() / expected.norm()) < 0.1


def test_what_is_allowed_by_max_error():
    lora = adapted()
    model = lora.merge_and_unload(max_error=2.0)
    assert stored(model) == ["0.weight_stored", "2.weight_stored"]


def test_dequantizing_reaches_weights_that_no_adapter_updates():
    lora = adapted(target_modules=["0"], quantize_modules="all")
    assert not stored(lora.merge_and_unload(dequantize=True))


def test_ties_are_kept():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    lora = LoraModel(model, LoraConfig(r=2, quantize="nf4", quantize_options={"min_size": 0}, init="none"))
    lora.merge_and_unload(dequantize=True)
    assert model["head"].weight is model["embed"].weight


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.middle(self.embed(x.argmax(1))).tanh())


TIED = LoraConfig(r=2, init="none", quantize="nf4", quantize_options={"min_size": 0})


def test_both_ends_of_a_tie_are_merged():
    lora = LoraModel(Tied(), TIED)
    before = output(lora.model)
    lora.merge_adapter()
    torch.testing.assert_close(output(lora.model), before)
    assert lora.model.head.weight is lora.model.embed.weight
    lora.unmerge_adapter()
    assert torch.equal(output(lora.model), before)


@pytest.mark.parametrize("fold", ["merge_adapter", "merge_and_unload"])
def test_one_end_of_a_stored_tie_is_not_merged_into_both(fold, untouched):
    model = Tied()
    lora = LoraModel(model, replace(TIED, target_modules=["middle"], quantize_modules="all"))
    lora.add_adapter("other", LoraConfig(r=2, init="none", target_modules=["embed"]))
    lora.set_adapter("other")
    arguments = {"dequantize": True} if fold == "merge_and_unload" else {}
    with untouched(model), pytest.raises(MergeError, match=r"'embed.weight' is the same tensor as 'head.weight'"):
        getattr(lora, fold)(**arguments)


def test_an_adapter_that_asks_for_what_is_stored_changes_no_tie():
    lora = LoraModel(Tied(), TIED)
    lora.add_adapter("other", replace(TIED, target_modules=["embed"]))
    assert len(stored(lora.model)) == 2


def test_unloading():
    lora = adapted()
    dense = lora.model[0].weight_stored.dense()
    codes = lora.model[0].weight_stored.codes
    with pytest.warns(UserWarning, match=r"2 weights stay stored as 'nf4': their float values were not kept"):
        model = lora.unload()
    assert model[0].weight_stored.codes is codes
    assert torch.equal(lora.unload(dequantize=True)[0].weight, dense)  # as the warning says
    with pytest.raises(StateError, match="no adapter any more"):
        lora.unload(dequantize=True)
    model = adapted().unload(dequantize=True)
    assert torch.equal(model[0].weight, dense)
    assert model[0].weight.requires_grad
    assert list(model.state_dict()) == list(build().state_dict())
    assert torch.equal(model[4].weight, build()[4].weight)


def test_a_frozen_model_stays_frozen():
    model = build().requires_grad_(False)
    LoraModel(model, LoraConfig(r=2, quantize="nf4", quantize_options={"min_size": 0})).merge_and_unload(
        dequantize=True
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_fresh_adapter_loses_nothing():
    lora = adapted(scale=0.0)
    with torch.no_grad():
        expected = output(lora.model)
    model = lora.merge_and_unload()
    assert stored(model) == ["0.weight_stored", "2.weight_stored"]
    assert torch.equal(output(model), expected)


def test_a_base_that_stayed_stored_is_trainable_when_it_is_merged_dense():
    model = adapted().unload(dequantize=False)
    LoraModel(model, LoraConfig(r=2, target_modules=["0"])).merge_and_unload(dequantize=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
