"""Layers and tensors in groups."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.plan.groups import group_names, group_tensors


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)


def blocks(count=12):
    return nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(count)), "head": nn.Linear(4, 2)})


def grouped(model, **fields):
    return LoraModel.plan(model, LoraConfig(**{"r": 2, **fields})).groups()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("rows", "share"), [(4, 0.75), (0, math.inf)])
def test_the_share_of_the_weight_is_there_for_weights_without_elements_too(rows, share):
    assert [group.share for group in grouped(nn.Sequential(nn.Linear(8, rows)), target_modules=["0"])] == [share]


class TestNames:
    @pytest.mark.parametrize(
        ("names", "groups"),
        [
            (["a.0.b", "a.1.b", "a.2.b"], {"a.0-2.b": 3}),
            (["a.0.b", "a.2.b", "a.5.b", "a.6.b"], {"a.0,2,5-6.b": 4}),
            (["a.0.b", "a.0.c", "a.1.b"], {"a.0-1.b": 2, "a.0.c": 1}),
            ([f"s.{i}.{j}.x" for i in range(3) for j in range(2)], {"s.0-2.0-1.x": 6}),
            (["s.0.0.x", "s.0.1.x", "s.1.0.x", "s.2.0.x", "s.2.1.x"], {"s.0,2.0-1.x": 4, "s.1.0.x": 1}),
            (["0", "1", "10"], {"0-1,10": 3}),
            (["conv1", "conv2", "layer1.0.conv1"], {"conv1": 1, "conv2": 1, "layer1.0.conv1": 1}),
            (["a.0.x = b.0.x", "a.1.x = b.1.x"], {"a.0.x = b.0.x": 1, "a.1.x = b.1.x": 1}),
            (["a.0.x[q][v]", "a.1.x[q][v]"], {"a.0-1.x[q][v]": 2}),
            (["a.01.x", "a.1.x"], {"a.01.x": 1, "a.1.x": 1}),
        ],
        ids=[
            "a range",
            "gaps",
            "tails",
            "two numbers",
            "no box",
            "only numbers",
            "parts of words",
            "ties",
            "parts",
            "01",
        ],
    )
    def test_numbers_become_ranges(self, names, groups):
        assert {label: len(members) for label, members in group_names(names).items()} == groups

    @settings(deadline=None)
    @given(st.sets(st.tuples(*[st.integers(0, 3)] * 3), min_size=1))
    def test_a_label_names_what_is_there_and_nothing_else(self, rows):
        names = [f"a.{i}.b.{j}.{k}.c" for i, j, k in sorted(rows)]
        groups = group_names(names)
        assert sorted(name for members in groups.values() for name in members) == sorted(names)
        for label, members in groups.items():
            assert sorted(spelled_out(label)) == sorted(members)


def spelled_out(label):
    """The names that a label stands for, by its grammar."""
    choices = []
    for part in label.split("."):
        spans = [run.split("-") for run in part.split(",")]
        numbers = part[0].isdigit()
        choices.append([str(n) for s in spans for n in range(int(s[0]), int(s[-1]) + 1)] if numbers else [part])
    return [".".join(parts) for parts in product(*choices)]


class TestLayers:
    def test_blocks_are_one_row(self):
        (qkv, proj, head) = grouped(blocks())
        assert (qkv.name, len(qkv.layers)) == ("blocks.0-11.qkv", 12)
        assert (proj.name, len(proj.layers)) == ("blocks.0-11.proj", 12)
        assert (head.name, len(head.layers)) == ("head", 1)
        assert (qkv.parameters, qkv.weight) == (12 * 2 * (4 + 12), 12 * 4 * 12)

    @pytest.mark.parametrize(
        "fields", [{"rank_pattern": {"blocks.3.qkv": 4}}, {"alpha_pattern": {"blocks.3.qkv": 4}}], ids=["rank", "alpha"]
    )
    def test_a_layer_with_another_setting_stands_alone(self, fields):
        names = [group.name for group in grouped(blocks(), target_modules=["qkv"], **fields)]
        assert names == ["blocks.0-2,4-11.qkv", "blocks.3.qkv"]

    def test_every_layer_is_in_one_group(self):
        plan = LoraModel.plan(blocks(), LoraConfig(r=2, rank_pattern={"blocks.0": 3}))
        found = [layer.name for group in plan.groups() for layer in group.layers]
        assert sorted(found) == sorted(layer.name for layer in plan.layers)
        assert sum(group.parameters for group in plan.groups()) == plan.adapter_parameters

    def test_a_model_that_is_one_layer(self):
        assert [group.name for group in grouped(nn.Linear(3, 3))] == ["(the model)"]


class TestTensors:
    def test_a_module_counts_its_tensors(self):
        config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"], bias="lora_only")
        plan = LoraModel.plan(blocks(), config)
        assert plan.trained_groups() == {"head": 2, "blocks.0-11.qkv.bias": 12}

    @pytest.mark.parametrize(
        ("modules", "groups"),
        [
            ([], {"net.decoder.0-1.weight": 2, "net.decoder.0.bias": 1}),
            (["decoder"], {"net.decoder": 3}),
            (["net.decoder.0"], {"net.decoder.0": 2, "net.decoder.1.weight": 1}),
            (["coder"], {"net.decoder.0-1.weight": 2, "net.decoder.0.bias": 1}),
        ],
        ids=["none", "a decoder", "a block", "half a word"],
    )
    def test_modules_are_whole_components(self, modules, groups):
        names = ["net.decoder.0.weight", "net.decoder.0.bias", "net.decoder.1.weight"]
        assert group_tensors(names, modules) == groups
