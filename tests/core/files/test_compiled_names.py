"""Adapters of models that `torch.compile` wraps, whole or in part: files are interchangeable with plain models."""

import pytest
import torch
from torch import nn

from lora_plugins import InitData, LoraConfig, LoraModel
from tests.core.file_cases import adapt, assert_same_state, build, own_tensors

FIELDS = [
    pytest.param({"modules_to_save": ["head"], "bias": "all", "norm": "track"}, id="all that is trained besides"),
    pytest.param({"init": "loftq"}, id="changed base"),
    pytest.param({"quantize": "nf4", "quantize_options": {"min_size": 0}}, id="stored base"),
    pytest.param({"target_modules": r"blocks\.\d", "exclude_modules": ["blocks.1"]}, id="expression"),
]


def whole():
    return torch.compile(build(), backend="eager")


def in_part():
    model = build()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.qkv = torch.compile(model.qkv, backend="eager")
    return model


def plain_tensors(model):
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in own_tensors(model).items()}


@pytest.mark.parametrize("compiled", [whole, in_part])
class TestFolders:
    @pytest.mark.parametrize("fields", FIELDS)
    def test_a_compiled_model_writes_what_a_plain_one_reads(self, tmp_path, compiled, fields):
        model, fresh = compiled(), build()
        adapt(model, **fields).save_adapter(tmp_path)
        assert "_orig_mod" not in (tmp_path / "adapter.json").read_text()
        LoraModel.load_adapter(fresh, tmp_path)
        assert_same_state(plain_tensors(model), own_tensors(fresh))

    @pytest.mark.parametrize("fields", FIELDS)
    def test_a_compiled_model_reads_what_a_plain_one_wrote(self, tmp_path, compiled, fields):
        model, fresh = build(), compiled()
        adapt(model, **fields).save_adapter(tmp_path)
        LoraModel.load_adapter(fresh, tmp_path)
        assert_same_state(own_tensors(model), plain_tensors(fresh))

    def test_values_of_one_are_swapped_into_the_other(self, tmp_path, compiled):
        model, other = build(), compiled()
        adapt(model, modules_to_save=["head"]).save_adapter(tmp_path)
        adapt(other, modules_to_save=["head"]).swap_adapter("default", tmp_path)
        assert_same_state(own_tensors(model), plain_tensors(other))

    def test_what_was_combined(self, tmp_path, compiled):
        model, fresh = compiled(), build()
        lora = adapt(model)
        lora.add_adapter("other", LoraConfig(r=3, target_modules=["qkv"], init="none"))
        lora.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
        lora.set_adapter("sum")
        lora.save_adapter(tmp_path)
        LoraModel.load_adapter(fresh, tmp_path)
        found, expected = own_tensors(fresh), plain_tensors(model)
        assert any("lora_B.sum" in name for name in found)
        assert_same_state(found, {name: expected[name] for name in found})

    def test_what_came_from_another_library(self, tmp_path, compiled):
        adapt(build(), rank_pattern={"qkv": 3}).save_adapter(tmp_path / "theirs", format="peft")
        model, fresh = compiled(), build()
        LoraModel.load_adapter(model, tmp_path / "theirs").save_adapter(tmp_path / "ours")
        LoraModel.load_adapter(fresh, tmp_path / "ours")
        assert_same_state(plain_tensors(model), own_tensors(fresh))


def test_a_model_that_is_one_layer(tmp_path):
    model, fresh = torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 4)
    fresh.load_state_dict(model._orig_mod.state_dict())
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none")).save_adapter(tmp_path)
    LoraModel.load_adapter(fresh, tmp_path)
    assert_same_state(plain_tensors(model), own_tensors(fresh))


def test_ranks_that_an_init_gave(tmp_path):
    """Those stand in the manifest by the name of the layer as well."""

    def net():
        torch.manual_seed(1)
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        nn.init.uniform_(first.weight[1:], -0.01, 0.01)  # what the second layer sees has few directions
        return nn.Sequential(first, second)

    data = list(torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(2)))
    model, fresh = torch.compile(net(), backend="eager"), net()
    config = LoraConfig(r=3, target_modules="all", init="eva", init_options={"rho": 2.0})
    lora = LoraModel(model, config, init_data=InitData(data))
    assert len({layer.r for layer in lora.plans["default"].layers}) == 2
    lora.save_adapter(tmp_path)
    LoraModel.load_adapter(fresh, tmp_path)
    assert_same_state(plain_tensors(model), own_tensors(fresh))
