"""Matching of names: whole components and regular expressions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from lora_plugins.plan.patterns import ends_with, nearest, select

VIT = [f"blocks.{block}.{layer}" for block in range(12) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]

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

    def test_an_entry_of_a_list_may_be_a_name_in_full(self):
        assert select("f", ["^norm", "fc"], ["a.norm", "norm", "a.fc"]) == {"^norm": ["norm"], "fc": ["a.fc"]}
        with pytest.raises(TargetError):
            select("f", ["^norm"], ["a.norm"])

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
