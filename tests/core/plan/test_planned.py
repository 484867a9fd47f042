"""Planning is a function of what the survey found: plans of models that do not exist."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, TargetError
from lora_plugins.plan.planner import planned
from lora_plugins.plan.sites import OwnParameter, Site, Survey, Weight
from lora_plugins.plan.survey import survey
from lora_plugins.plugins import INITS, LAYERS, PLAIN, VARIANTS, Slot, class_path, default_registry

REGISTRY = default_registry()


def site(name, key, shape=(8, 4), cls=nn.Linear, **about):
    """A layer as the survey would find it."""
    plugin = next(o.plugin for o in REGISTRY.of(LAYERS).values() if o.plugin.module_type is cls)
    fields = {
        "names": (name,),
        "class_name": cls.__name__,
        "class_path": class_path(cls),
        "computes_as": (class_path(cls),),
        "plugin": plugin,
        "slots": (Slot("weight"),),
        "weights": {"weight": Weight(key, shape)},
        "biases": ("bias",),
        "has_parameters": True,
        "matrices": ("weight",),
    }
    return Site(**{**fields, **about})


def model(*sites, **parameters):
    """A model of these layers, with their weights and biases as its parameters."""
    own = {f"{s.name}.weight": OwnParameter(w.key, w.shape[0] * w.shape[1]) for s in sites for w in s.weights.values()}
    biases = {f"{s.name}.bias": OwnParameter(-at, 8) for at, s in enumerate(sites, 1)}
    return Survey(sites, {**own, **biases, **parameters})


def plan(found, **fields):
    config = LoraConfig(**{"r": 2, **fields})
    variant = None if config.variant == PLAIN else REGISTRY.get(VARIANTS, config.variant)
    return planned(found, config, REGISTRY, REGISTRY.get(INITS, config.init), variant)


TWO = model(site("blocks.0.up", 1), site("blocks.0.down", 2, (4, 8)))


def test_ranks_scalings_and_counts():
    found = plan(TWO, alpha=4.0, rank_pattern={"down": 3}, alpha_pattern={"up": 1.0})
    assert [(layer.name, layer.r, layer.scaling, layer.parameters) for layer in found.layers] == [
        ("blocks.0.up", 2, 0.5, 24),
        ("blocks.0.down", 3, 4 / 3, 36),
    ]
    assert (found.base_parameters, found.adapter_parameters) == (32 + 32 + 8 + 8, 60)


@pytest.mark.parametrize(("variant", "said"), [(PLAIN, "48 in A and B,"), ("dora", "60 in A, B and magnitude,")])
def test_the_summary_names_what_it_counts(variant, said):
    assert said in plan(TWO, variant=variant).summary()


def test_layers_that_share_a_weight_get_one_adapter():
    (layer,) = plan(model(site("embed", 1), site("head", 1))).layers
    assert (layer.name, [tie.layer for tie in layer.ties]) == ("embed", ["head"])


def test_dropout_is_refused_for_layers_of_two_types_that_share_a_weight():
    with pytest.raises(
        TargetError, match=r"'b': it shares the weight of 'a', and cannot honor dropout=0\.1; set dropout=0 or"
    ):
        plan(model(site("a", 1), site("b", 1, cls=nn.Conv1d)), dropout=0.1)


@pytest.mark.parametrize(
    ("about", "use"),
    [
        pytest.param({}, "always", id="same_type"),
        pytest.param({"cls": nn.Embedding}, "never", id="other_type"),
        pytest.param({"computes_as": ("my.Linear",)}, "never", id="forward_of_its_own"),
    ],
)
def test_a_tied_layer_holds_the_same_settings_and_a_branch_of_its_own(about, use):
    (layer,) = plan(model(site("first", 1), site("head", 1, **about))).layers
    tied = layer.tied(layer.ties[0])
    assert (tied.name, tied.settings is layer.settings, tied.branch_use) == ("head", True, use)


@pytest.mark.parametrize(
    ("about", "fields", "words"),
    [
        pytest.param({"scripted": True}, {}, "TorchScript", id="scripted"),
        pytest.param({"foreign": ("lora_A",)}, {}, "has an attribute 'lora_A' already", id="another library"),
        pytest.param({"weights": {"weight": Weight(1, (8, 4), torch.int8)}}, {}, "torch.int8", id="integers"),
        pytest.param({"weights": {"weight": Weight(1, (8, 4), on_meta=True)}}, {}, "meta device", id="meta"),
        pytest.param(
            {"weights": {"weight": Weight(1, (8, 4), computed=True)}},
            {"init": "pissa"},
            "is a buffer, or computed",
            id="computed",
        ),
        pytest.param({"computes_as": ("my.Linear",)}, {"dropout": 0.1}, "cannot honor dropout=0.1", id="dropout"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(about, fields, words):
    with pytest.raises(TargetError, match=f"'up': .*{words}"):
        plan(model(site("up", 1, **about)), **fields)


QUANTIZED = Weight(1, (8, 4), foreign="a library")


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_an_init_that_needs_float_values_does_not_start_from_quantized_ones(init):
    found = model(site("up", 1, weights={"weight": QUANTIZED}))
    with pytest.raises(TargetError, match=rf"'up': .*quantized by a library already, so the init '{init}'"):
        plan(found, init=init)


@pytest.mark.parametrize("init", ["gaussian", "eva"])
def test_other_inits_start_from_quantized_values(init):
    (layer,) = plan(model(site("up", 1, weights={"weight": QUANTIZED})), init=init).layers
    assert layer.name == "up"


def test_all_reasons_are_told_at_once():
    with pytest.raises(TargetError) as caught:
        plan(model(site("up", 1, scripted=True), site("down", 2, scripted=True)))
    assert [name in str(caught.value) for name in ("'up'", "'down'")] == [True, True]


def test_what_a_plugin_raised_stops_only_who_targets_the_layer():
    found = model(site("up", 1), site("odd", 2, failure=ValueError("what is this")))
    assert [layer.name for layer in plan(found, target_modules=["up"]).layers] == ["up"]
    with pytest.raises(ValueError, match="what is this"):
        plan(found)


def test_parameters_without_a_shape_are_refused():
    with pytest.raises(TargetError, match=r"'lazy.weight' has no shape yet"):
        plan(model(site("up", 1), **{"lazy.weight": OwnParameter(9, 0, lazy=True)}))


def test_an_unknown_part_of_a_fused_layer_offers_what_there_is():
    parts = {"q": Slot("weight", "q", (0, 4, 8)), "k": Slot("weight", "k", (4, 8, 8))}
    with pytest.raises(ConfigError, match="has no part 'v'"):
        plan(model(site("qkv", 1, parts=parts)), fused_parts={"qkv": ["v"]})


def test_the_survey_of_a_model_gives_the_same_plan():
    """The records above are what the survey finds."""
    net = nn.ModuleDict({"up": nn.Linear(4, 8)})
    found = survey(net, REGISTRY)
    up = next(each for each in found.sites if each.name == "up")
    expected = site("up", id(net["up"].weight))
    assert up == replace(expected, parts=up.parts)
    assert plan(found).layers == plan(model(expected)).layers
