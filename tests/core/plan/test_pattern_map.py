"""Values by pattern: the most specific one counts."""

import pytest

from lora_plugins import TargetError
from lora_plugins.plan.pattern_map import PatternMap

VIT = [f"blocks.{block}.{layer}" for block in range(12) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]


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
def test_the_key_with_most_components_wins(values, name, expected):
    assert PatternMap("rank_pattern", values, VIT).get([name], 0) == expected


@pytest.mark.parametrize("values", [{"blocks.0": 1, "attn.qkv": 2}, {"qkv": 1, "attn": 2}, {"q.*": 1, ".*v": 2}])
def test_a_tie_is_an_error_that_names_both_keys_and_the_layer(values):
    ranks = PatternMap("alpha_pattern", values, VIT)
    with pytest.raises(TargetError) as caught:
        ranks.get(["blocks.0.attn.qkv"], 0)
    for word in ("alpha_pattern", "blocks.0.attn.qkv", *values):
        assert repr(word).strip("'") in str(caught.value)


def test_a_key_without_a_match_is_an_error_that_offers_the_near_one():
    with pytest.raises(TargetError, match=r"rank_pattern: 'mlp\.fc3'.*Did you mean 'mlp\.fc1'"):
        PatternMap("rank_pattern", {"attn.qkv": 1, "mlp.fc3": 2}, VIT)
