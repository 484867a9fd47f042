"""Counts of parameters: of weights in fewer bytes, the dense values count."""

import pytest
from torch import nn

from lora_plugins import LoraConfig, LoraModel


def model():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def printed(model, capsys):
    LoraModel(model).print_trainable_parameters()
    return capsys.readouterr().out


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_stored_base_counts_as_the_dense_one(storage, capsys):
    dense, stored = model(), model()
    LoraModel(dense, LoraConfig(r=2))
    LoraModel(stored, LoraConfig(r=2, quantize=storage, quantize_options={"min_size": 0}))
    assert printed(stored, capsys) == printed(dense, capsys)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_the_plan_of_a_second_adapter_counts_the_dense_base(storage):
    lora = LoraModel(model(), LoraConfig(r=2, quantize=storage, quantize_options={"min_size": 0}))
    lora.add_adapter("second", LoraConfig(r=4))
    assert lora.plans["second"].base_parameters == lora.plans["default"].base_parameters


def test_a_tied_parameter_counts_once(capsys):
    tied = model()
    tied.append(nn.Linear(64, 96))
    tied[3].weight = tied[0].weight
    LoraModel(tied, LoraConfig(r=2, target_modules=["2"]))
    total = sum(parameter.numel() for parameter in tied.parameters())
    assert f"all params: {total:,d} ||" in printed(tied, capsys)


def test_a_layer_without_a_shape_yet_counts_for_nothing(capsys):
    lazy = model()
    LoraModel(lazy, LoraConfig(r=2, target_modules=["0"]))
    lazy.append(nn.LazyLinear(3))
    shaped = sum(parameter.numel() for parameter in lazy[:3].parameters())
    assert f"all params: {shaped:,d} ||" in printed(lazy, capsys)
