"""`LoraConfig`: every field is checked when the config is made, and the error names the field."""

import dataclasses
import inspect
import json
from collections import UserDict, UserList
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_plugins import ConfigError, LoraConfig, LoraError
from lora_plugins.field_checks import check_names
from lora_plugins.words import FIELDS

BAD = {
    "r": [0, -1, 2.5, True, "8", None],
    "alpha": [0, -1.0, 10**400, float("nan"), float("inf"), "16", True, None],
    "dropout": [-0.1, 1.0, 1.5, float("nan"), "0.1", None, True],
    "target_modules": [[], "", [""], ["a", 3], 5, {"a": 1}],
    "exclude_modules": [[""], ["a", 3], 5, None],
    "bias": ["lora-only", "None", None, 1],
    "modules_to_save": ["head", [""], ["head", 3], 5, None],
    "layers_to_transform": [[1.5], [None], -1, [-1], [""], 1.5, True, {"a": 1}],
    "layers_pattern": [[""], ["layers", 3], 5],
    "rank_pattern": [{"a": 0}, {"a": 2.0}, {"a": "4"}, {3: 4}, {"": 4}, ["a"], None],
    "alpha_pattern": [{"a": 0}, {"a": "4"}, {"a": float("nan")}, {3: 4.0}, {"": 4.0}, ["a"], None],
    "fused_parts": [{"qkv": []}, {"qkv": None}, {"qkv": [1]}, {3: ["q"]}, {"": ["q"]}, ["qkv"], None],
    "init": ["", None, 3, ["kaiming"]],
    "init_options": [["bits"], None, {3: 4}, {"file": Path("a.pt")}, {"nested": [{"of": {1, 2}}]}, {"by": {3: 4}}],
    "variant": ["", None, 3],
    "use_rslora": ["false", 1, None],
    "quantize": ["", 4, ["nf4"]],
    "quantize_modules": [[""], ["a", 3], 5],
    "quantize_options": [["block_size"], None, {3: 4}, {"dtype": torch.bfloat16}],
    "memory": ["lo", None, ["low"]],
    "norm": ["frozen", None, ["freeze"]],
    "allow_plugins": ["example", [""], ["example", 3], 5],
    "block_plugins": ["example", [""], ["example", 3], 5, None],
}


def test_every_field_has_bad_values():
    assert set(BAD) == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize(
    ("field", "value"),
    [pytest.param(field, value, id=f"{field}={value!r}") for field, values in BAD.items() for value in values],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value):
    others = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    with pytest.raises(ConfigError, match=field):
        LoraConfig(**others, **{field: value})


def test_an_option_that_no_file_can_hold_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"'file' is .*Path\('a.pt'\), which no .* path is str\(path\)"):
        LoraConfig(init_options={"file": Path("a.pt")})


@pytest.mark.parametrize(
    ("field", "value", "offered"),
    [("bias", "lora-only", "lora_only"), ("norm", "freez", "freeze"), ("bias", "zzz", "'all', 'lora_only', 'none'")],
)
def test_a_choice_offers_what_there_is(field, value, offered):
    with pytest.raises(ConfigError, match=offered):
        LoraConfig(**{field: value})


def test_layers_pattern_needs_layers_to_transform():
    with pytest.raises(ConfigError, match=r"layers_pattern.*layers_to_transform"):
        LoraConfig(layers_pattern=["blocks"])


def test_an_unknown_field_offers_the_near_one():
    with pytest.raises(ConfigError, match=r"'target_module'.*Did you mean 'target_modules'"):
        LoraConfig.from_dict({"target_module": ["qkv"]})


def test_config_errors_are_value_errors_of_the_library():
    assert issubclass(ConfigError, LoraError)
    assert issubclass(ConfigError, ValueError)


def test_fields_are_frozen_and_given_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 4
    with pytest.raises(TypeError, match=r"by name, not 8 by place: LoraConfig\(r=8"):
        LoraConfig(8)


def test_a_config_survives_json():
    config = LoraConfig(
        r=3,
        alpha=2.5,
        target_modules=["a", "b.c"],
        layers_to_transform=["stages.0.blocks.1", 2],
        layers_pattern=["blocks"],
        rank_pattern={"a": 2},
        alpha_pattern={"b": 1.5},
        fused_parts={"qkv": ["q", "v"]},
        init="loftq",
        init_options={"bits": 2},
        modules_to_save=["head"],
        use_rslora=True,
        norm="track",
    )
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_tuples_become_lists_as_they_do_in_files():
    given = LoraConfig(target_modules=("a", "b"), modules_to_save=("c",), fused_parts={"a": ("q",)}, block_plugins=())
    assert given == LoraConfig(target_modules=["a", "b"], modules_to_save=["c"], fused_parts={"a": ["q"]})
    assert LoraConfig.from_dict(json.loads(json.dumps(given.to_dict()))) == given


def test_lists_and_dictionaries_of_other_classes_become_plain():
    """As those of a library of configurations, which has classes of its own for both."""
    given = LoraConfig(
        target_modules=UserList(["a", "b"]),
        layers_to_transform=UserList([0, 1]),
        rank_pattern=UserDict({"a": 2}),
        fused_parts=UserDict({"a": UserList(["q"])}),
        init_options=UserDict({"nested": UserDict({"bits": UserList([2, 4])})}),
    )
    plain = LoraConfig(
        target_modules=["a", "b"],
        layers_to_transform=[0, 1],
        rank_pattern={"a": 2},
        fused_parts={"a": ["q"]},
        init_options={"nested": {"bits": [2, 4]}},
    )
    assert given == plain
    assert json.loads(json.dumps(given.to_dict())) == plain.to_dict()


def test_numbers_of_other_classes_become_plain():
    """A checkpoint with those of NumPy is not read without permission."""
    given = LoraConfig(
        r=np.int64(4),
        alpha=np.sqrt(16),
        dropout=np.float32(0.5),
        rank_pattern={"a": np.int32(2)},
        init_options={"b": np.int8(3)},
    )
    assert given == LoraConfig(r=4, alpha=4.0, dropout=0.5, rank_pattern={"a": 2}, init_options={"b": 3})
    numbers = [given.r, given.alpha, given.dropout, given.rank_pattern["a"], given.init_options["b"]]
    assert [type(number) for number in numbers] == [int, float, float, int, int]


class Start(str, Enum):  # noqa: UP042 (whose own text is its name)
    GAUSSIAN = "gaussian"


def test_texts_of_other_classes_become_plain():
    given = LoraConfig(
        init=Start.GAUSSIAN,
        target_modules=list(np.unique(["b", "a"])),
        rank_pattern={np.str_("a"): 2},
        init_options={"how": Start.GAUSSIAN},
    )
    assert (
        given.to_dict()
        == LoraConfig(
            init="gaussian", target_modules=["a", "b"], rank_pattern={"a": 2}, init_options={"how": "gaussian"}
        ).to_dict()
    )
    texts = [given.init, *given.target_modules, *given.rank_pattern, given.init_options["how"]]
    assert {type(text) for text in texts} == {str}


def test_to_dict_hands_out_copies():
    config = LoraConfig(target_modules=["a"], rank_pattern={"a": 2})
    values = config.to_dict()
    values["target_modules"].append("b")
    values["rank_pattern"]["a"] = 9
    assert config == LoraConfig(target_modules=["a"], rank_pattern={"a": 2})


class TestWordsOfPeft:
    @pytest.mark.parametrize(
        ("field", "hint"),
        [
            ("lora_alpha", "It is 'alpha' here"),
            ("lora_dropout", "It is 'dropout' here"),
            ("rank", "It is 'r' here"),
            ("init_lora_weights", "It is 'init' here"),
            ("use_dora", "variant='dora'"),
            ("task_type", "Name a new head in 'modules_to_save'"),
            ("fan_in_fan_out", "Leave it out"),
            ("use_qalora", "a plugin can bring it"),
        ],
    )
    def test_they_are_told(self, field, hint):
        with pytest.raises(ConfigError, match=f"LoraConfig has no field '{field}'.*{hint}"):
            LoraConfig(**{field: 1})

    def test_all_are_told_at_once(self):
        """As those of an `adapter_config.json`, which has two dozen."""
        with pytest.raises(ConfigError) as caught:
            LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, peft_version="1", revision=None)
        assert str(caught.value).splitlines() == [
            "LoraConfig has no field 'lora_alpha'. It is 'alpha' here.",
            "LoraConfig has no field 'lora_dropout'. It is 'dropout' here.",
            "LoraConfig has no field 'peft_version', 'revision'. Leave it out: the model itself is adapted, whatever "
            "it is for.",
        ]

    def test_a_typo_is_told_too(self):
        with pytest.raises(ConfigError, match=r"no field 'drop_out'\. Did you mean 'dropout'"):
            LoraConfig(drop_out=0.1)

    def test_every_field_of_peft_is_a_field_here_or_told(self):
        peft = pytest.importorskip("peft")
        theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        ours = {field.name for field in dataclasses.fields(LoraConfig)}
        assert theirs - ours - set(FIELDS) == set()
        assert ours & set(FIELDS) == set()

    def test_the_signature_is_that_of_the_fields(self):
        assert [*inspect.signature(LoraConfig).parameters] == [field.name for field in dataclasses.fields(LoraConfig)]


def test_a_list_of_a_class_of_its_own_is_not_shown_as_a_list():
    with pytest.raises(ConfigError, match=r"^names is a list of names, not \['a'\] of the class UserList\.$"):
        check_names("names", UserList(["a"]))
