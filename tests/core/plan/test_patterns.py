"""Matching of names: whole components, regular expressions, specificity, and blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from lora_plugins.plan.patterns import BlockFilter, PatternMap, ends_with, nearest, select

VIT = [f"blocks.{block}.{layer}" for block in range(12) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]
SWIN = [f"layers.{s}.blocks.{b}.attn.qkv" for s in range(3) for b in range(2)]
CONVNEXT = [f"stages.{s}.blocks.{b}.mlp.fc1" for s in range(2) for b in range(2)]
SEGFORMER = [f"encoder.block.{s}.{b}.attention.self.query" for s in range(2) for b in range(2)]
RESNET = [f"layer{s}.{b}.conv1" for s in (1, 2) for b in range(2)]

component = st.text(alphabet="ab1_/ é", min_size=1, max_size=3)
path = st.lists(component, min_size=1, max_size=5)


class TestWholeComponents:
    @pytest.mark.parametrize(
        ("pattern", "name", "ends"),
        [
            ("qkv", "blocks.0.attn.qkv", True),
            ("attn.qkv", "blocks.0.attn.qkv", True),
            ("blocks.0.attn.qkv", "blocks.0.attn.qkv", True),
            ("kv", "blocks.0.attn.qkv", False),
            ("tn.qkv", "blocks.0.attn.qkv", False),
            ("attn", "blocks.0.attn.qkv", False),
            ("a.blocks.0.attn.qkv", "blocks.0.attn.qkv", False),
        ],
    )
    def test_a_pattern_matches_no_part_of_a_component(self, pattern, name, ends):
        assert ends_with(pattern, name) is ends

    @given(path, path)
    def test_matching_is_that_of_the_lists_of_components(self, pattern, parts):
        assert ends_with(".".join(pattern), ".".join(parts)) == (parts[-len(pattern) :] == pattern)


class TestSelect:
    def test_a_list_is_literal(self):
        assert select("f", ["attn.qkv"], ["attn.qkv", "attnXqkv"]) == {"attn.qkv": ["attn.qkv"]}
        assert select("f", ["a+b"], ["x.a+b", "x.aab"]) == {"a+b": ["x.a+b"]}

    def test_a_string_is_an_expression_over_the_whole_name(self):
        found = select("f", r"blocks\.[01]\.attn\..*", VIT)
        assert [name for names in found.values() for name in names] == [
            "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj",
        ]  # fmt: skip
        with pytest.raises(TargetError):
            select("f", r"attn\.qkv", VIT)

    def test_one_pattern_without_a_match_is_enough_for_an_error(self):
        with pytest.raises(TargetError, match=r"f: 'attn\.qvk' matches no module.*Did you mean 'attn\.qkv'"):
            select("f", ["attn.proj", "attn.qvk"], VIT)

    @pytest.mark.parametrize("expression", ["blocks.(", "*", "[", "a{99999999999999999999}", "(" * 5000], ids=repr)
    def test_a_broken_expression_names_the_field(self, expression):
        with pytest.raises(ConfigError, match=r"target_modules '.*' is not a regular expression"):
            select("target_modules", expression, VIT)

    def test_near_matches_are_as_long_as_the_pattern(self):
        assert nearest("atn.qkv", VIT) == "Did you mean 'attn.qkv'?"
        assert nearest("fc2", VIT) == "Did you mean 'fc1'?"


class TestPatternMap:
    @pytest.mark.parametrize(
        ("values", "name", "expected"),
        [
            pytest.param({"qkv": 2}, "blocks.0.attn.qkv", 2, id="last component"),
            pytest.param({"attn": 2}, "blocks.0.attn.proj", 2, id="component in the middle"),
            pytest.param({"blocks.1": 2}, "blocks.1.mlp.fc1", 2, id="block"),
            pytest.param({"blocks.1": 2}, "blocks.11.mlp.fc1", 0, id="block 1 is not block 11"),
            pytest.param({"qkv": 2, "blocks.0": 3}, "blocks.0.attn.qkv", 3, id="two components before one"),
            pytest.param({"blocks.0": 3, "qkv": 2}, "blocks.0.attn.qkv", 3, id="whatever the order"),
            pytest.param({"blocks.0.attn.qkv": 5, "0.attn.qkv": 4}, "blocks.0.attn.qkv", 5, id="full name first"),
            pytest.param({"qkv|proj": 6, "qkv": 2}, "blocks.0.attn.qkv", 2, id="literal before expression"),
            pytest.param({"qkv|proj": 6, "qkv": 2}, "blocks.0.attn.proj", 6, id="expression alone"),
            pytest.param({r"^blocks\.\d\..*": 6}, "blocks.9.mlp.fc1", 6, id="anchored expression"),
            pytest.param({r"^blocks\.\d\..*": 6}, "blocks.10.mlp.fc1", 0, id="anchored expression, other name"),
        ],
    )
    def test_the_key_with_most_components_wins(self, values, name, expected):
        assert PatternMap("rank_pattern", values, VIT).get([name], 0) == expected

    @pytest.mark.parametrize("values", [{"blocks.0": 1, "attn.qkv": 2}, {"qkv": 1, "attn": 2}, {"q.*": 1, ".*v": 2}])
    def test_a_tie_is_an_error_that_names_both_keys_and_the_layer(self, values):
        ranks = PatternMap("alpha_pattern", values, VIT)
        with pytest.raises(TargetError) as caught:
            ranks.get(["blocks.0.attn.qkv"], 0)
        for word in ("alpha_pattern", "blocks.0.attn.qkv", *values):
            assert repr(word).strip("'") in str(caught.value)

    def test_a_key_without_a_match_is_an_error_that_offers_the_near_one(self):
        with pytest.raises(TargetError, match=r"rank_pattern: 'mlp\.fc3'.*Did you mean 'mlp\.fc1'"):
            PatternMap("rank_pattern", {"attn.qkv": 1, "mlp.fc3": 2}, VIT)


class TestBlocks:
    @pytest.mark.parametrize(
        ("names", "blocks", "containers", "expected"),
        [
            pytest.param(VIT, 1, None, [n for n in VIT if n.startswith("blocks.1.")], id="vit, one number"),
            pytest.param(VIT, [0, 11], None, VIT[:3] + VIT[-3:], id="vit, numbers"),
            pytest.param(VIT, "blocks.1", None, [n for n in VIT if n.startswith("blocks.1.")], id="vit, path"),
            pytest.param(SWIN, ["layers.2.blocks.1"], None, ["layers.2.blocks.1.attn.qkv"], id="swin, path"),
            pytest.param(SWIN, [1], "blocks", [n for n in SWIN if "blocks.1." in n], id="swin, block 1 of each stage"),
            pytest.param(SWIN, [1], ["layers"], [n for n in SWIN if "layers.1." in n], id="swin, stage 1"),
            pytest.param(CONVNEXT, ["stages.1"], None, CONVNEXT[2:], id="convnext, stage by path"),
            pytest.param(CONVNEXT, "stages.0.blocks.1", None, [CONVNEXT[1]], id="convnext, block by path"),
            pytest.param(SEGFORMER, ["block.1.0"], None, [SEGFORMER[2]], id="segformer, block by path"),
            pytest.param(SEGFORMER, [1], None, SEGFORMER[2:], id="segformer, stage by number"),
            pytest.param(RESNET, [1], ["layer2"], ["layer2.1.conv1"], id="resnet, container of its own name"),
            pytest.param(
                SWIN, ["layers.0", "layers.1.blocks.1"], None, [SWIN[0], SWIN[1], SWIN[3]], id="swin, mixed depth"
            ),
        ],
    )
    def test_numbers_and_paths_choose_blocks(self, names, blocks, containers, expected):
        keep = BlockFilter(blocks, containers, names)
        assert [name for name in names if keep(name)] == expected

    @pytest.mark.parametrize("names", [SWIN, CONVNEXT], ids=["swin", "convnext"])
    def test_a_number_in_nested_containers_is_ambiguous(self, names):
        outer, inner = ".".join(names[0].split(".")[:1]), ".".join(names[0].split(".")[:3])
        with pytest.raises(TargetError) as caught:
            BlockFilter([1], None, names)
        for words in ("layers_to_transform", repr(outer), repr(inner), f"'{inner}.0'", "layers_pattern"):
            assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("names", "block", "containers", "offered"),
        [
            (VIT, 12, None, "blocks.11"),
            (VIT, "blocks.12", None, "blocks.11"),
            (SWIN, "layers.3.blocks.0", None, "layers.2.blocks.1"),
            (SWIN, 2, "blocks", "layers.2.blocks.1"),
            (VIT, "locks.1", None, "blocks.1"),
        ],
    )
    def test_a_block_that_is_not_there_is_an_error_that_lists_what_is(self, names, block, containers, offered):
        with pytest.raises(TargetError, match=f"layers_to_transform.*{block!r}.*{offered}"):
            BlockFilter([0 if containers else "0", block], containers, names)

    @pytest.mark.parametrize("containers", ["block", ["blocks", "block"]], ids=["alone", "beside a good one"])
    def test_a_container_that_is_not_there_is_an_error_that_offers_the_near_one(self, containers):
        with pytest.raises(TargetError, match=r"layers_pattern: 'block'.*Did you mean 'blocks'"):
            BlockFilter([0], containers, VIT)

    def test_a_digit_that_is_no_number_is_a_name(self):
        names = ["layers.².fc", "layers.0.fc"]
        assert [name for name in names if BlockFilter([0], None, names)(name)] == ["layers.0.fc"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["net.0", "net.2"], "rank_pattern": {"net.2": 2}},
        {"target_modules": r"net\.[02]", "rank_pattern": {r"^net\.2": 2}},
        {"target_modules": "all", "exclude_modules": ["net.1"], "rank_pattern": {"net.2": 2}},
        {"target_modules": ["net.0"], "modules_to_save": ["net.2"]},
    ],
    ids=["ends", "expression", "excluded", "saved"],
)
def test_a_compiled_part_is_named_as_if_it_were_not(options):
    """`torch.compile` puts a module in between, which nobody who writes a configuration has in mind."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    plain, compiled = Model(), Model()
    compiled.net = torch.compile(compiled.net, backend="eager")
    config = LoraConfig(r=3, **options)
    wanted, found = (LoraModel.plan(model, config) for model in (plain, compiled))
    assert {layer.name.replace("_orig_mod.", ""): layer.r for layer in found.layers} == {
        layer.name: layer.r for layer in wanted.layers
    }
    assert [name.replace("_orig_mod.", "") for name in found.trained] == list(wanted.trained)
