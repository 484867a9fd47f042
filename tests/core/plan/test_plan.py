"""The plan: which layers, with which rank and alpha; errors that name the field; and nothing touched, ever."""

import ast
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lora_plugins import ConfigError, LoraConfig, LoraError, LoraModel, PluginError, TargetError
from lora_plugins.plugins import Tie


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})


class Stage(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.downsample = nn.ModuleDict({"reduction": nn.Linear(width, 2 * width, bias=False)})


class SwinLike(nn.Module):
    """Named as timm names Swin: numbered blocks inside of numbered stages."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4))
        self.layers = nn.ModuleList([Stage(4, 2), Stage(8, 3)])
        self.position = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(16), "fc": nn.Linear(16, 5)})


def integer_linear():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return layer


def names(plan):
    return [layer.name for layer in plan.layers]


@pytest.fixture
def swin():
    return SwinLike()


def plan(model, **fields):
    return LoraModel.plan(model, LoraConfig(**fields))


class TestTargets:
    def test_all_means_every_layer_that_a_plugin_handles(self, swin):
        handled = [name for name, module in swin.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert names(plan(swin)) == handled

    def test_all_leaves_out_what_is_saved_in_full(self, swin):
        adapted = names(plan(swin, modules_to_save=["head", "downsample"]))
        assert "head.fc" not in adapted
        assert not [name for name in adapted if "downsample" in name]
        assert "layers.1.blocks.2.mlp.fc2" in adapted

    def test_a_list_matches_whole_components_from_the_end(self, swin):
        found = names(plan(swin, target_modules=["qkv", "0.mlp.fc1", "patch_embed.0"]))
        blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
        assert sorted(found) == sorted(
            ["patch_embed.0", "layers.0.blocks.0.mlp.fc1", "layers.1.blocks.0.mlp.fc1"]
            + [f"{block}.attn.qkv" for block in [*blocks, "layers.1.blocks.2"]]
        )

    def test_a_string_is_an_expression_over_the_whole_name(self, swin):
        found = names(plan(swin, target_modules=r"layers\.1\.blocks\.\d\.attn\.(qkv|proj)"))
        assert found == [f"layers.1.blocks.{b}.attn.{n}" for b in range(3) for n in ("qkv", "proj")]

    def test_containers_that_an_expression_also_matches_are_passed_over(self, swin):
        assert names(plan(swin, target_modules=r"layers\.0\.blocks\.0\.attn.*")) == [
            "layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.attn.proj",
        ]  # fmt: skip

    def test_exclude_takes_away(self, swin):
        everything = names(plan(swin))
        assert names(plan(swin, exclude_modules=["fc1", "head.fc"])) == [
            name for name in everything if not name.endswith(("mlp.fc1", "head.fc"))
        ]
        assert names(plan(swin, exclude_modules=r"layers\..*")) == ["patch_embed.0", "head.fc"]

    def test_exclude_makes_a_wide_expression_usable(self, swin):
        found = plan(swin, target_modules=r"layers\.0\.blocks\.0\..*", exclude_modules=["norm1"])
        assert names(found) == [f"layers.0.blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]

    def test_biases_of_integers_are_not_trained(self):
        model = nn.ModuleDict({"body": nn.Linear(3, 4), "coded": nn.Linear(3, 4)})
        model["coded"].bias = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
        assert plan(model, target_modules=["body"], bias="all").trained == ("body.bias",)

    def test_a_model_that_is_one_layer(self):
        found = plan(nn.Linear(3, 4), r=2)
        assert names(found) == [""]
        assert "(the model)" in str(found)

    def test_blocks_and_targets_together(self, swin):
        found = plan(swin, target_modules=["qkv"], layers_to_transform=[0], layers_pattern="blocks")
        assert names(found) == ["layers.0.blocks.0.attn.qkv", "layers.1.blocks.0.attn.qkv"]
        found = plan(swin, target_modules=["qkv", "fc1"], layers_to_transform="layers.1.blocks.2")
        assert names(found) == ["layers.1.blocks.2.attn.qkv", "layers.1.blocks.2.mlp.fc1"]


class TestRanks:
    def test_the_exact_set_of_layer_rank_and_alpha(self, swin):
        found = plan(
            swin,
            target_modules=["attn.qkv", "attn.proj", "reduction"],
            r=4,
            alpha=8,
            layers_to_transform=["layers.0", "layers.1.blocks.2"],
            rank_pattern={"layers.0": 2, "layers.0.blocks.1.attn": 6, "proj": 3, "layers.1.blocks.2.attn.proj": 5},
            alpha_pattern={r"^layers\.1\..*": 1.5, "qkv": 10},
        )
        assert {(layer.name, layer.r, layer.alpha) for layer in found.layers} == {
            ("layers.0.blocks.0.attn.qkv", 2, 10),
            ("layers.0.blocks.0.attn.proj", 2, 8),
            ("layers.0.blocks.1.attn.qkv", 6, 10),
            ("layers.0.blocks.1.attn.proj", 6, 8),
            ("layers.0.downsample.reduction", 2, 8),
            ("layers.1.blocks.2.attn.qkv", 4, 10),
            ("layers.1.blocks.2.attn.proj", 5, 1.5),
        }
        assert all(layer.scaling == layer.alpha / layer.r for layer in found.layers)

    def test_rank_stabilized_scaling(self, swin):
        found = plan(swin, target_modules=["qkv"], r=4, alpha=6, use_rslora=True, rank_pattern={"layers.1": 9})
        assert {(layer.r, layer.scaling) for layer in found.layers} == {(4, 6 / math.sqrt(4)), (9, 6 / math.sqrt(9))}

    def test_counts_are_those_of_the_injected_model(self, swin):
        fields = {"r": 3, "target_modules": ["qkv", "patch_embed.0"], "modules_to_save": ["head"], "bias": "all"}
        found = plan(swin, **fields, fused_parts={"qkv": ["q", "v"]})
        LoraModel(swin, LoraConfig(**fields, fused_parts={"qkv": ["q", "v"]}))
        assert found.total == sum(p.numel() for p in swin.parameters())
        assert found.trainable == sum(p.numel() for p in swin.parameters() if p.requires_grad)
        assert f"{found.trainable:,} of {found.total:,}" in found.summary()

    def test_the_table_shows_every_layer(self, swin):
        found = plan(swin, target_modules=["qkv"], r=3, alpha=6)
        rows = str(found).splitlines()
        assert rows[0].split() == ["layer", "class", "plugin", "r", "alpha", "parameters"]
        assert rows[1].split() == ["layers.0.blocks.0.attn.qkv", "Linear", "linear", "3", "6", "48"]
        assert len(rows) == 1 + 5 + 1


class TestFusedParts:
    def test_parts_are_slots_of_their_own(self, swin):
        found = plan(swin, target_modules=["qkv"], r=2, fused_parts={"qkv": ["v", "q"], "layers.0.blocks.0": ["k"]})
        parts = {layer.name: [slot.part for slot in layer.slots] for layer in found.layers}
        assert parts.pop("layers.0.blocks.0.attn.qkv") == ["k"]
        assert set(map(tuple, parts.values())) == {("q", "v")}
        assert found.layers[-1].shapes == ((8, 8), (8, 8))

    def test_the_rest_of_the_matrix_is_not_moved(self, swin):
        before = swin.layers[1].blocks[0].attn.qkv.weight.detach().clone()
        LoraModel(swin, LoraConfig(target_modules=["qkv"], r=2, init="none", fused_parts={"qkv": ["q", "v"]}))
        moved = (swin.layers[1].blocks[0].attn.qkv.weight != before).any(dim=1)
        assert moved.tolist() == [True] * 8 + [False] * 8 + [True] * 8


class TestTrainedInPlace:
    def test_modules_and_single_parameters(self, swin):
        found = plan(swin, target_modules=["qkv"], modules_to_save=["head.fc", "position", "downsample"])
        assert set(found.trained) == {
            "position", "layers.0.downsample.reduction.weight", "layers.1.downsample.reduction.weight",
            "head.fc.weight", "head.fc.bias",
        }  # fmt: skip
        assert found.trained_parameters == 4 + 4 * 8 + 8 * 16 + 16 * 5 + 5

    def test_a_saved_norm_layer_brings_its_statistics(self, swin):
        found = plan(swin, target_modules=["qkv"], modules_to_save=["head"])
        assert set(found.saved_buffers) == {
            "head.norm.running_mean", "head.norm.running_var", "head.norm.num_batches_tracked",
        }  # fmt: skip
        assert found.frozen_norms == ("patch_embed.1",)

    @pytest.mark.parametrize(
        ("bias", "expected"),
        [
            ("none", set()),
            ("lora_only", {"layers.0.blocks.0.attn.qkv.bias"}),
            ("all", {name for name, _ in SwinLike().named_parameters() if name.endswith("bias")}),
        ],
    )
    def test_biases(self, swin, bias, expected):
        found = plan(swin, target_modules=["layers.0.blocks.0.attn.qkv"], bias=bias)
        assert set(found.trained) == expected

    def test_a_weight_is_not_trained_twice(self, swin, untouched):
        with untouched(swin), pytest.raises(TargetError, match=r"'head\.fc\.weight' would be trained in place"):
            plan(swin, target_modules=["head.fc"], modules_to_save=["head.fc.weight"])


NEAR_MISSES = [
    # field, its value, the entry that the message names, what it offers
    ("target_modules", ["attn.qkv", "attn.porj"], "attn.porj", "attn.proj"),
    ("target_modules", r".*\.qvk", "qvk", "There is"),
    ("target_modules", "layers.(", "layers.(", "not a regular expression"),
    ("target_modules", ["qkv", "attn"], "'attn'", "'qkv'"),
    ("target_modules", ["norm1"], "'norm1'", "no plugin adapts"),
    ("exclude_modules", ["fc1", "fc3"], "'fc3'", "'fc2'"),
    ("exclude_modules", r".*\.fc3", "fc3", "fc2"),
    ("modules_to_save", ["haed"], "'haed'", "'head'"),
    ("modules_to_save", ["head", "positions"], "'positions'", "'position'"),
    ("layers_to_transform", ["layers.0", "layers.2"], "'layers.2'", "layers.1.blocks.0"),
    ("layers_to_transform", 0, "the number 0", "'layers.0.blocks.0'"),
    ("layers_pattern", "block", "'block'", "'blocks'"),
    ("layers_pattern", ["blocks", "layer"], "'layer'", "'layers'"),
    ("rank_pattern", {"qkv": 2, "attn.qvk": 3}, "'attn.qvk'", "'attn.qkv'"),
    ("alpha_pattern", {"fc4": 3.0}, "'fc4'", "'fc1'"),
    ("fused_parts", {"qvk": ["q"]}, "'qvk'", "'qkv'"),
    ("fused_parts", {"qkv": ["q", "w"]}, "'w'", "'k', 'q', 'v'"),
    ("fused_parts", {"patch_embed.0": ["q"]}, "'patch_embed.0'", "no parts"),
    ("init", "kaimin", "'kaimin'", "'kaiming'"),
    ("init_options", {"bits": 4}, "'bits'", "There are none"),
]


class TestNearMisses:
    @pytest.mark.parametrize(
        ("field", "value", "named", "offered"),
        [pytest.param(*case, id=f"{case[0]}={case[1]!r}") for case in NEAR_MISSES],
    )
    def test_one_bad_entry_is_an_error_that_names_it(self, swin, untouched, field, value, named, offered):
        fields = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
        with untouched(swin), pytest.raises((ConfigError, PluginError)) as caught:
            LoraModel(swin, LoraConfig(**fields, **{field: value}))
        for words in (field, named, offered):
            assert words in str(caught.value)

    def test_an_option_of_an_init_offers_the_near_one(self, swin, untouched):
        with untouched(swin), pytest.raises(ConfigError, match=r"init_options: 'loftq'.*'bit'.*'bits'"):
            LoraModel(swin, LoraConfig(init="loftq", init_options={"bit": 4}))

    @pytest.mark.parametrize(
        ("exclude", "meant"),
        [
            (["attn"], r".*\.attn\..*"),
            (r".*\.attn", r".*\.attn\..*"),
            (["attn", "fc1"], r".*\.attn\..*|.*\.fc1"),
            (["layers"], r"layers\..*"),
        ],
        ids=["several", "expression", "and others", "one"],
    )
    def test_an_exclusion_that_cannot_exclude_anything_is_an_error(self, swin, untouched, exclude, meant):
        """A list names layers, not what lies below them, so this would leave every layer adapted."""
        with untouched(swin), pytest.raises(TargetError, match=r"exclude_modules: '.* excludes none") as caught:
            LoraModel(swin, LoraConfig(exclude_modules=exclude))
        offered = ast.literal_eval(re.search(r"expression: exclude_modules=(.+)\.$", str(caught.value))[1])
        names = {layer.name for layer in LoraModel.plan(swin, LoraConfig(exclude_modules=offered)).layers}
        everywhere = {layer.name for layer in LoraModel.plan(swin, LoraConfig()).layers}
        assert everywhere - names == {name for name in everywhere if re.fullmatch(meant, name)} != set()

    def test_a_module_with_no_layer_in_it_excludes_nothing(self):
        with pytest.raises(TargetError, match=r"exclude_modules: '1' matches '1', .* excludes none\. There is '0'\.$"):
            LoraModel(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), LoraConfig(exclude_modules=["1"]))

    def test_excluding_every_target_is_an_error(self, swin, untouched):
        with untouched(swin), pytest.raises(TargetError, match="nothing is left to adapt"):
            LoraModel(swin, LoraConfig(target_modules=["qkv"], exclude_modules=["qkv"]))

    def test_what_could_be_adapted_is_listed_where_nothing_is_left(self, swin):
        with pytest.raises(TargetError, match=r"Layers that could be adapted: .*attn\.qkv"):
            LoraModel(swin, LoraConfig(target_modules=["qkv"], exclude_modules=["qkv"]))

    def test_an_empty_list_of_what_could_be_adapted_says_so(self):
        with pytest.raises(TargetError, match=r"nothing is left to adapt.*Layers that could be adapted: none\."):
            LoraModel(nn.Sequential(nn.Linear(2, 2)), LoraConfig(modules_to_save=["0"]))

    def test_a_tie_of_rank_patterns_is_an_error(self, swin, untouched):
        with untouched(swin), pytest.raises(TargetError, match=r"rank_pattern.*equally well"):
            LoraModel(swin, LoraConfig(rank_pattern={"attn.qkv": 2, "layers.0": 3}))


class TestWhatCannotBeServed:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            pytest.param(lambda: nn.Linear(2, 2, device="meta"), "meta device", id="meta"),
            pytest.param(lambda: nn.LazyLinear(2), "no shape yet", id="lazy"),
            pytest.param(integer_linear, "torch.int8", id="integers"),
            pytest.param(nn.PReLU, "no plugin adapts", id="nobody's type"),
        ],
    )
    def test_a_layer_is_refused_by_name_with_the_reason(self, make, reason):
        model = nn.ModuleDict({"good": nn.Linear(2, 2), "odd": make()})
        with pytest.raises(TargetError, match=f"(?s)odd.*{reason}"):
            LoraModel(model, LoraConfig(target_modules=["good", "odd"]))
        assert type(model["good"]) is nn.Linear

    def test_a_layer_without_a_shape_is_refused_wherever_it_is(self):
        model = nn.ModuleDict({"good": nn.Linear(2, 2), "later": nn.LazyLinear(2)})
        with pytest.raises(TargetError, match=r"'later\.weight'.*no shape yet"):
            LoraModel(model, LoraConfig(target_modules=["good"], modules_to_save=["later"]))

    def test_all_reasons_are_given_at_once(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, device="meta"), "b": integer_linear()})
        with pytest.raises(TargetError, match=r"(?s)'a'.*'b'"):
            LoraModel.plan(model, LoraConfig())

    def test_another_library_s_adapter_is_refused(self):
        model = nn.ModuleDict({"fc": nn.Linear(2, 2)})
        model["fc"].lora_A = nn.Parameter(torch.zeros(1, 2))
        with pytest.raises(TargetError, match=r"'fc'.*lora_A"):
            LoraModel.plan(model, LoraConfig())


class TestSharing:
    def test_a_shared_module_is_planned_once_under_all_its_names(self):
        shared = nn.Linear(3, 3)
        model = nn.ModuleDict({"first": shared, "other": nn.Linear(3, 3), "second": shared})
        found = plan(model, target_modules=["second"])
        assert [(layer.name, layer.aliases) for layer in found.layers] == [("first", ("second",))]
        assert "first = second" in str(found)

    @pytest.mark.parametrize("name", ["first", "second"])
    def test_every_name_of_a_shared_module_takes_part_in_every_field(self, name):
        shared = nn.Linear(3, 3)
        model = nn.ModuleDict({"first": shared, "other": nn.Linear(3, 3), "second": shared})
        assert plan(model, rank_pattern={name: 2}, alpha_pattern={name: 3}).layers[0].r == 2
        assert plan(model, rank_pattern={name: 2}, alpha_pattern={name: 3}).layers[0].alpha == 3
        assert names(plan(model, exclude_modules=[name])) == ["other"]
        assert names(plan(model, modules_to_save=[name])) == ["other"]
        assert set(plan(model, modules_to_save=[name]).trained) == {"first.weight", "first.bias"}

    def test_two_names_that_ask_for_two_ranks_are_an_error(self):
        shared = nn.Linear(3, 3)
        model = nn.ModuleDict({"first": shared, "second": shared})
        with pytest.raises(TargetError, match=r"rank_pattern.*'first' and 'second'"):
            plan(model, rank_pattern={"first": 2, "second": 3})

    def test_the_alias_stays_the_same_object(self):
        shared = nn.Linear(3, 3)
        model = nn.ModuleDict({"first": shared, "second": shared})
        LoraModel(model, LoraConfig(init="none", r=2))
        x = torch.randn(2, 3)
        assert model["first"] is model["second"]
        assert torch.equal(model["first"](x), model["second"](x))

    def test_a_tied_weight_has_one_adapter(self):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        found = plan(model, r=2)
        assert [(layer.name, layer.ties) for layer in found.layers] == [("embed", (Tie("out", "weight", "weight"),))]
        assert found.adapter_parameters == 2 * (5 + 3)
        LoraModel(model, LoraConfig(r=2, init="none"))
        assert torch.equal(model["embed"].weight, model["out"].weight)


class TestNothingIsTouched:
    FIELDS = (
        {},
        {"target_modules": ["qkv"], "modules_to_save": ["head"], "bias": "all", "norm": "track"},
        {"init": "loftq", "r": 2, "init_options": {"iterations": 2}},
        {"target_modules": ["qkv"], "fused_parts": {"qkv": ["q"]}, "layers_to_transform": ["layers.0"]},
    )

    @pytest.mark.parametrize("fields", FIELDS, ids=["default", "heads", "loftq", "parts"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_planning_touches_nothing(self, swin, untouched, fields, training):
        swin.train(training)
        swin.layers[0].requires_grad_(False)
        swin.head["fc"].register_forward_hook(lambda *_: None)
        with untouched(swin):
            plan(swin, **fields)

    def test_planning_does_not_move_a_power_iteration(self, untouched):
        model = nn.ModuleDict({"fc": parametrizations.spectral_norm(nn.Linear(4, 4))}).train()
        with untouched(model):
            plan(model, r=2)

    def test_planning_a_second_adapter_touches_nothing(self, swin, untouched):
        LoraModel(swin, LoraConfig(target_modules=["qkv"], init="none"))
        with untouched(swin):
            first = plan(swin)
            with pytest.raises(LoraError):
                plan(swin, target_modules=["nothing"])
        assert {layer.module_class for layer in first.layers} == {"Linear", "Conv2d"}

    def test_the_config_of_the_caller_is_not_changed(self, swin):
        targets, ranks = ["qkv"], {"qkv": 2}
        config = LoraConfig(target_modules=targets, rank_pattern=ranks)
        LoraModel(swin, config)
        assert (targets, ranks) == (["qkv"], {"qkv": 2})
        assert config == LoraConfig(target_modules=["qkv"], rank_pattern={"qkv": 2})


def test_a_model_that_is_adapted_already_has_the_same_norms():
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), spectral)
    config = LoraConfig(target_modules=["0"])
    before = LoraModel.plan(model, config).frozen_norms
    assert before == ("1", "2.parametrizations.weight.0")
    LoraModel(model, config)
    assert LoraModel.plan(model, config).frozen_norms == before


@pytest.mark.parametrize("rslora", [False, True])
def test_other_ranks_keep_the_scaling(swin, rslora):
    found = plan(swin, target_modules=["qkv", "proj"], r=4, alpha=6, use_rslora=rslora)
    first, second, *others = names(found)
    changed = found.with_ranks({first: 9, second: 0})
    assert names(changed) == [first, *others]
    assert [layer.r for layer in changed.layers] == [9, *[4] * len(others)]
    assert changed.layers[0].settings.scaling == pytest.approx(found.layers[0].settings.scaling)
    assert changed.layers[0].alpha == pytest.approx(found.layers[0].scaling * (3 if rslora else 9))
    assert changed.layers[1:] == found.layers[2:]
    assert dict(changed.ranks) == {first: 9, second: 0}


def test_a_layer_that_stands_at_several_places_is_planned_once_by_all_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared}), "d": shared})
    (layer,) = plan(model).layers
    assert (layer.name, layer.aliases) == ("a", ("b.c", "d"))


class TestRanksThatNoWeightCanHave:
    def net(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Conv2d(3, 5, 3))

    def test_they_are_said_once_with_the_largest_that_has_a_use(self):
        plan = LoraModel.plan(self.net(), LoraConfig(r=4000))
        assert len(plan.notes) == 1
        assert re.search(r"no layer can use its rank: .* 5 in '1' \(r=4000\)", str(plan))

    @pytest.mark.parametrize(
        "fields", [{"r": 5}, {"r": 4000, "rank_pattern": {"0": 4}}], ids=["one has room", "pattern"]
    )
    def test_nothing_is_said_where_a_layer_can_use_it(self, fields):
        assert LoraModel.plan(self.net(), LoraConfig(**fields)).notes == ()
