"""What is surprising in files of PEFT: one test for each trap, against PEFT itself where it has an answer."""

import json
import struct
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError
from tests.core.formats.peft_cases import CASES, TOLERANCE, Case, difference, moved, read_by_peft, with_ours, with_peft
from tests.core.libraries import Conv1D

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BY_ID = {case.id: case for case in CASES}
LINEAR, ATTENTION = BY_ID["linear"], BY_ID["attention"]
SINGLE = replace(LINEAR, dtype=torch.float32)
"""For starts that PEFT computes in single precision, and refuses on a base in double."""


def edit_config(folder, **fields):
    """Changes fields of a config; None takes one out."""
    content = {**json.loads((folder / CONFIG).read_text()), **fields}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder, change):
    """Lets a function change the tensors of a file by key."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def refused(case, folder, untouched, match, **options):
    model = case.build()
    with untouched(model), pytest.raises(AdapterFileError, match=match):
        LoraModel.load_adapter(model, folder, **options)


class TestAttention:
    """PEFT up to 0.21.2 applies the update of `out_proj` twice, before merging and after."""

    def test_the_product_counts_twice(self, tmp_path):
        with_peft(ATTENTION).save_pretrained(tmp_path)
        B = load_file(tmp_path / TENSORS)["base_model.model.mha.base_layer.out_proj.lora_B.weight"]
        model = ATTENTION.build()
        LoraModel.load_adapter(model, tmp_path)
        assert torch.equal(model.mha.out_proj.lora_B["default"], 2 * B)

    def test_merged_too(self, tmp_path):
        theirs = with_peft(ATTENTION)
        theirs.save_pretrained(tmp_path)
        model = ATTENTION.build()
        LoraModel.load_adapter(model, tmp_path).merge_adapter()
        assert difference(ATTENTION, model, theirs.merge_and_unload()) <= TOLERANCE

    def test_a_later_version_has_to_be_explained(self, tmp_path, untouched):
        with_peft(ATTENTION).save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version="0.99.0")
        refused(ATTENTION, tmp_path, untouched, r"0\.99\.0.*format_options=\{'out_proj': 'once'\}")
        outputs = {}
        for times in ("once", "twice"):
            model = ATTENTION.build()
            LoraModel.load_adapter(model, tmp_path, format_options={"out_proj": times})
            outputs[times] = model.mha.out_proj.lora_B["default"]
        assert torch.equal(outputs["twice"], 2 * outputs["once"])

    @pytest.mark.parametrize("version", [None, "0.15.0", "0.21.2"])
    def test_older_versions_are_known(self, tmp_path, version):
        theirs = with_peft(ATTENTION)
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version=version)
        model = ATTENTION.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(ATTENTION, model, theirs) <= TOLERANCE

    def test_an_unknown_reading_is_refused(self, tmp_path):
        with_peft(ATTENTION).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"out_proj is 'two'\. Did you mean"):
            LoraModel.load_adapter(ATTENTION.build(), tmp_path, format_options={"out_proj": "two"})

    def test_out_proj_alone_has_two_meanings(self, tmp_path, untouched):
        case = Case("out_proj alone", ATTENTION.model, {"target_modules": ["out_proj"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        assert difference(case, theirs, case.build()) == 0  # the trap: it is ignored
        refused(case, tmp_path, untouched, r"'mha\.out_proj' has two meanings.*format_options=\{'out_proj': 'once'\}")
        model = case.build()
        LoraModel.load_adapter(model, tmp_path, format_options={"out_proj": "once"})
        assert difference(case, model, theirs.merge_and_unload()) <= TOLERANCE


class TestStarts:
    """`pissa` and `olora` look like plain adapters, and are adapters of another base."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_they_are_computed_again(self, init, tmp_path):
        theirs = with_peft(SINGLE, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        model = SINGLE.build()
        lora = LoraModel.load_adapter(model, tmp_path)
        assert difference(SINGLE, model, theirs) <= 1e-6  # float32: outputs around 1 have steps of 1e-7
        lora.unload()
        assert difference(SINGLE, model, SINGLE.build()) == 0

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_read_naively_they_are_far_off(self, init, tmp_path):
        theirs = with_peft(SINGLE, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, init_lora_weights=True)
        model = SINGLE.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(SINGLE, model, theirs) > 1e-2

    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_ours_are_written_as_a_difference(self, init, use_rslora, tmp_path):
        lora = with_ours(LINEAR, init=init, use_rslora=use_rslora)
        lora.save_adapter(tmp_path, format="peft")
        assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4  # [A; A0], [B, -B0]
        assert difference(LINEAR, read_by_peft(LINEAR, tmp_path), lora.model) <= TOLERANCE

    def test_loftq_cannot_be_written(self, tmp_path):
        lora = with_ours(LINEAR, init="loftq")
        with pytest.raises(AdapterFileError, match=r"'inner\.fc': the init 'loftq', whose base is no low-rank change"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "lora_ga", "corda"])
    def test_what_cannot_be_computed_again_is_refused(self, init, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_config(tmp_path, init_lora_weights=init)
        refused(LINEAR, tmp_path, untouched, f"started by '{init}'.*path_initial_model_for_weight_conversion")

    @pytest.mark.parametrize("init", [False, "gaussian", "orthogonal", "mica"])
    def test_the_others_are_plain(self, init, tmp_path):
        case = SINGLE if init == "mica" else LINEAR
        theirs = with_peft(case, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(case, model, theirs) <= (1e-6 if init == "mica" else TOLERANCE)


class TestPatterns:
    """The first pattern that matches counts, and PEFT sorts them when it saves."""

    PATTERNS = Case("", LINEAR.model, {"target_modules": ["fc"], "alpha_pattern": {"inner.fc": 5, "fc": 7}})

    def test_a_lost_order_has_to_be_explained(self, tmp_path, untouched):
        theirs = with_peft(self.PATTERNS)
        theirs.save_pretrained(tmp_path)
        refused(self.PATTERNS, tmp_path, untouched, r"alpha_pattern says \[7, 5\] of 'inner\.fc'")
        first, longest = self.PATTERNS.build(), self.PATTERNS.build()
        LoraModel.load_adapter(first, tmp_path, format_options={"patterns": "first"})
        LoraModel.load_adapter(longest, tmp_path, format_options={"patterns": "longest"})
        assert difference(self.PATTERNS, first, read_by_peft(self.PATTERNS, tmp_path)) <= TOLERANCE
        assert difference(self.PATTERNS, longest, theirs) <= TOLERANCE  # as it was trained
        assert difference(self.PATTERNS, longest, first) > 1e-3

    def test_what_we_write_survives_being_saved_by_peft(self, tmp_path):
        case = BY_ID["patterns"]
        lora = with_ours(case)
        lora.save_adapter(tmp_path / "ours", format="peft")
        read_by_peft(case, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        assert difference(case, read_by_peft(case, tmp_path / "theirs"), lora.model) <= TOLERANCE

    def test_a_rank_that_the_config_does_not_say(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_config(tmp_path, r=4)
        refused(LINEAR, tmp_path, untouched, "has rank 2 in the tensors and 4 in the config")


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.stem = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.tokens_out = nn.Linear(4, 6, bias=False)
        self.tokens_out.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.tokens_out(self.stem(self.embed_tokens(tokens)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.tanh(self.first(x)))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.ModuleDict({"b": nn.Linear(4, 2)})])

    def forward(self, x):
        x = self.stem(x)
        return self.heads[0](x) + self.heads[1]["b"](x)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Tiled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, -1), weight, bias)


class Single(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


SECOND_PATHS = {
    "padding mode": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "the padding mode"),
    "dilation": (lambda: nn.Conv1d(3, 4, 3, dilation=2), "the dilation"),
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=0.5), "max_norm"),
    "forward": (lambda: Doubled(3, 4), "the forward of Doubled"),
    "convolution": (lambda: Tiled(3, 4, 3), "the forward of Tiled"),
}


class TestKeys:
    """PEFT warns of missing keys, and computes without them: an adapter can do nothing."""

    def test_a_missing_layer_is_listed(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".inner.fc." in key])
        refused(LINEAR, tmp_path, untouched, r"1 layers of this model that it has no A and B for: 'inner\.fc'")

    @pytest.mark.parametrize(
        ("gone", "match"),
        [
            pytest.param("head.", r"trained 'head' in full \(modules_to_save\) and has no values", id="a head"),
            pytest.param("head.weight", r"lacks 'head\.weight'", id="a tensor of a head"),
            pytest.param("running_mean", r"lacks 'block\.bn\.running_mean'", id="a statistic"),
        ],
    )
    def test_missing_values_are_listed(self, gone, match, tmp_path, untouched):
        case = replace(
            BY_ID["heads with statistics"], peft={"target_modules": ["line"], "modules_to_save": ["bn", "head"]}
        )
        with_peft(case).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if gone in key])
        refused(case, tmp_path, untouched, match)

    def test_half_a_layer_is_listed(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.inner.fc.lora_B.weight"))
        refused(LINEAR, tmp_path, untouched, r"lack their A or B: inner\.fc \(has only 'A'\)\.")

    @pytest.mark.parametrize(
        ("key", "match"),
        [
            pytest.param("fc.lora_A.weight", "does not start with 'base_model.model.'", id="no prefix"),
            pytest.param("base_model.model.fc.lora_C.weight", "no key of PEFT's LoRA", id="no factor"),
            pytest.param("base_model.model.other.weight", "'other.weight'", id="no tensor of the model"),
            pytest.param("base_model.model.fc.lora_B.bias", "lora_bias", id="a bias of B"),
            pytest.param(
                "base_model.model.emb.token_adapter.trainable_tokens_delta", "trained tokens", id="trained tokens"
            ),
        ],
    )
    def test_a_key_that_is_left_over_is_listed(self, key, match, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(2)}))
        refused(LINEAR, tmp_path, untouched, match)

    @pytest.mark.parametrize(
        ("saved", "targets", "match"),
        [
            pytest.param("stem", ["lora_stem"], "letters of 'stem', and so 'lora_stem'", id="an adapted layer"),
            pytest.param("head", ["lora_stem"], "and so 'head.sub_head'", id="a module inside"),
            pytest.param("layer", ["stem"], "and so 'stem'", id="the base_layer of PEFT's wrapper"),
            pytest.param("out", ["stem"], "and so 'stem'", id="the lora_dropout of PEFT's wrapper"),
            pytest.param("B", ["stem"], "and so 'stem'", id="the lora_B of PEFT's wrapper"),
            pytest.param("fault", ["stem"], "and so 'stem'", id="the name of an adapter"),
        ],
    )
    def test_what_peft_takes_for_a_head_as_well_is_refused_when_written(self, saved, targets, match, tmp_path):
        """PEFT compares the ends of names by letters: it fails when it reads what it wrote of such a model."""
        model = nn.ModuleDict(
            {
                "stem": nn.Linear(2, 2),
                "lora_stem": nn.Linear(2, 2),
                "layer": nn.Linear(2, 2),
                "out": nn.Linear(2, 2),
                "B": nn.Linear(2, 2),
                "fault": nn.Linear(2, 2),
                "head": nn.Sequential(OrderedDict(sub_head=nn.Linear(2, 2))),
            }
        )
        lora = LoraModel(model, LoraConfig(target_modules=targets, modules_to_save=[saved]))
        with pytest.raises(AdapterFileError, match=match):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("saved", ["tokens_out", "embed_tokens"])
    def test_a_head_that_shares_its_weight_is_written_under_each_name(self, saved, tmp_path):
        """PEFT gives each module that it trains a copy of its own."""
        case = Case("", SharedHead, {"target_modules": ["stem"]})
        model = case.build()
        LoraModel(model, LoraConfig(r=2, init="none", target_modules=["stem"], modules_to_save=[saved]))
        with torch.no_grad():
            model.tokens_out.weight.mul_(1.5)
        LoraModel(model).save_adapter(tmp_path, format="peft")
        again = case.build()
        LoraModel.load_adapter(again, tmp_path)
        tokens = torch.tensor([[1, 2]])
        for other in (again, read_by_peft(case, tmp_path)):
            torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(
        ("net", "saved", "left"),
        [
            pytest.param(SharedHead, "embed_tokens", "tokens_out.weight", id="a shared weight"),
            pytest.param(SharedHead, "tokens_out", "embed_tokens.weight", id="the other one"),
            pytest.param(
                lambda: nn.ModuleDict({"stem": nn.Linear(4, 4), "twice": Twice()}),
                "again",
                "twice.first.",
                id="a layer",
            ),
        ],
    )
    def test_the_copy_of_a_head_that_is_shared_here_is_refused(self, net, saved, left, tmp_path, untouched):
        """PEFT trains a copy, and leaves what shares the tensor as it was."""
        case = Case("", net, {"target_modules": ["stem"], "modules_to_save": [saved]})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, rf"PEFT trained a copy of .* and left '{left}")

    def test_values_that_differ_for_two_names_of_one_tensor_are_told_by_both(self, tmp_path, untouched):
        case = Case("", SharedHead, {"target_modules": ["stem"], "modules_to_save": ["embed_tokens", "tokens_out"]})
        with_peft(case).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.tokens_out.weight"].add_(1))
        refused(case, tmp_path, untouched, "'tokens_out.weight' and 'embed_tokens.weight' are one and the same")

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
    def test_a_rank_above_that_of_the_matrix_is_read(self, init, rslora, tmp_path):
        """PEFT's decompositions have no more ranks than the matrix, and scale by the rank of the config."""
        peft = pytest.importorskip("peft")
        case = Case("", lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {})
        options = {"r": 8, "lora_alpha": 4, "init_lora_weights": init, "use_rslora": rslora}
        config = peft.LoraConfig(target_modules=["0", "1"], **options)
        theirs = moved(peft.get_peft_model(case.build().float(), config))
        theirs.save_pretrained(tmp_path)
        model, x = case.build().float(), torch.ones(2, 4)
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)

    def test_a_container_that_is_trained_is_written_as_what_is_in_it(self, tmp_path):
        case = Case("", Heads, {"target_modules": ["stem"]})
        model = case.build()
        LoraModel(model, LoraConfig(r=2, init="none", target_modules=["stem"], modules_to_save=["heads"]))
        with torch.no_grad():
            model.heads[1]["b"].weight.mul_(1.5)
        LoraModel(model).save_adapter(tmp_path, format="peft")
        again, x = case.build(), torch.ones(2, 4, dtype=torch.float64)
        LoraModel.load_adapter(again, tmp_path)
        for other in (again, read_by_peft(case, tmp_path)):
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("kind", ["list", "dict"])
    def test_a_container_of_parameters_is_refused_when_written(self, kind, tmp_path):
        own = nn.Parameter(torch.zeros(4))
        model = nn.Module()
        model.stem = nn.Linear(4, 4)
        model.prompts = nn.ParameterList([own]) if kind == "list" else nn.ParameterDict({"0": own})
        lora = LoraModel(model, LoraConfig(target_modules=["stem"], modules_to_save=["prompts"]))
        with pytest.raises(AdapterFileError, match=r"'prompts\.0' was trained by itself"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    def test_a_head_inside_a_head_is_refused(self, tmp_path, untouched):
        """PEFT writes its first values over those that it trained, and raises a KeyError when it reads them."""

        class Nested(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Linear(6, 6)
                self.head = nn.Sequential(OrderedDict(norm=nn.LayerNorm(6), fc=nn.Linear(6, 3)))

        case = Case("", Nested, {"target_modules": ["stem"], "modules_to_save": ["head", "norm"]})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, r"names 'head\.norm', and 'head' around it")

    def test_names_of_a_compiled_model_are_understood(self, tmp_path):
        theirs = with_peft(LINEAR)
        theirs.save_pretrained(tmp_path)

        def compiled(tensors):
            for key in list(tensors):
                tensors[key.replace("base_model.model.", "base_model.model._orig_mod.")] = tensors.pop(key)

        edit_tensors(tmp_path, compiled)
        model = LINEAR.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(LINEAR, model, theirs) <= TOLERANCE

    def test_magnitudes_with_another_ending_are_understood(self, tmp_path):
        case = BY_ID["dora"]
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)

        def ending(tensors):
            for key in [key for key in tensors if key.endswith("magnitude_vector")]:
                tensors[f"{key}.weight"] = tensors.pop(key)

        edit_tensors(tmp_path, ending)
        model = case.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(case, model, theirs) <= TOLERANCE

    def test_another_model_is_refused(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        refused(ATTENTION, tmp_path, untouched, "are not in this model: 'fc'")

    def test_other_shapes_are_refused(self, tmp_path, untouched):
        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(7, 6)
                self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "more": nn.ModuleDict({"fc": nn.Linear(6, 3)})})

        with_peft(LINEAR).save_pretrained(tmp_path)
        refused(
            Case("", Wide), tmp_path, untouched, r"'fc' has A \(2, 6\) and B \(6, 2\), and this model needs \(2, 7\)"
        )


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 6, **options)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None

    def forward(self, x):
        return self.embed_tokens(x)


class TestLayers:
    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
    def test_groups_are_refused_when_read(self, tmp_path, untouched):
        case = Case("", Grouped, {"target_modules": ["conv"]})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, "'conv' is a convolution of 2 groups")

    @pytest.mark.parametrize(
        ("layer", "match"),
        [
            pytest.param(lambda: nn.Conv2d(4, 8, 3, groups=2), "a convolution of 2 groups", id="groups"),
            pytest.param(lambda: nn.ConvTranspose2d(4, 8, 3), "a layer of type 'conv_transpose2d'", id="transposed"),
            pytest.param(
                lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
                "an adapter of 'k_proj_weight', ",
                id="three weights",
            ),
        ],
    )
    def test_what_others_do_not_have_is_refused_when_written(self, layer, match, tmp_path):
        model = nn.ModuleDict({"layer": layer(), "other": nn.Linear(2, 2)})
        lora = LoraModel(model, LoraConfig(target_modules=["layer", "other"]))
        with pytest.raises(AdapterFileError, match=f"'layer': {match}"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("part", ["q", "k", "v"])
    def test_one_of_three_weights_is_refused_when_written(self, part, tmp_path):
        model = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)})
        lora = LoraModel(model, LoraConfig(target_modules=["layer"], fused_parts={"layer": [part]}))
        match = f"an adapter of '{part}_proj_weight' has no form"
        with pytest.raises(AdapterFileError, match=f"'layer': {match}"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("targets", [["layer"], ["layer.out_proj"]], ids=["inner", "outer"])
    def test_dora_on_a_projection_of_an_attention_is_refused_when_written(self, targets, tmp_path):
        model = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2)})
        lora = LoraModel(model, LoraConfig(target_modules=targets, variant="dora"))
        with pytest.raises(AdapterFileError, match=f"'{targets[0]}': PEFT has no DoRA on attention"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("format", ["diffusers", "kohya"])
    def test_the_output_projection_of_an_attention_is_refused_by_formats_of_pipelines(self, format, tmp_path):
        model = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2), "other": nn.Linear(2, 2)})
        lora = LoraModel(model, LoraConfig(target_modules=["out_proj", "other"]))
        path = tmp_path / "new.safetensors"
        with pytest.raises(AdapterFileError, match=r"'layer\.out_proj': the output projection of an attention, which"):
            lora.save_adapter(path, format=format, format_options={"component": "unet"})
        assert not path.exists()

    def test_shared_layers_are_refused_when_written(self, tmp_path):
        shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
        tied.weight = shared.weight
        lora = LoraModel(nn.ModuleDict({"a": shared, "b": shared, "c": tied}), LoraConfig())
        with pytest.raises(AdapterFileError, match=r"(?s)more than once.*a weight that several adapted layers share"):
            lora.save_adapter(tmp_path / "new", format="peft")

    def test_a_parameter_alone_is_refused_when_written(self, tmp_path):
        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.position = nn.Parameter(torch.zeros(4))
                self.layer = nn.Linear(4, 4)

        lora = LoraModel(Positions(), LoraConfig(target_modules=["layer"], modules_to_save=["position"]))
        with pytest.raises(AdapterFileError, match=r"'position' was trained by itself"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
    def test_the_copy_of_an_embedding_is_compared(self, tmp_path, untouched):
        case = Case("", Embedded, {"target_modules": ["embed_tokens"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        key = "base_model.model.embed_tokens.base_layer.weight"
        assert key in load_file(tmp_path / TENSORS)
        model, x = case.build(), torch.tensor([[1, 2]])
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=TOLERANCE)
        edit_tensors(tmp_path, lambda tensors: tensors[key].add_(1))
        refused(case, tmp_path, untouched, "comes with its own 'embed_tokens.weight'")

    @pytest.mark.parametrize(("layer", "left_out"), SECOND_PATHS.values(), ids=SECOND_PATHS)
    def test_a_second_path_that_is_not_the_layer_is_said_when_read(self, layer, left_out, tmp_path):
        case = Case("", lambda: Single(layer()), {"target_modules": ["layer"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        with pytest.warns(UserWarning, match=rf"'layer': PEFT can compute something else before.*{left_out}\. "):
            LoraModel.load_adapter(model, tmp_path)
        merged = theirs.merge_and_unload().layer.weight
        torch.testing.assert_close(model.layer.weight.detach(), merged.detach(), rtol=0, atol=TOLERANCE)

    def test_a_layer_that_has_another_name_is_said_when_read(self, tmp_path):
        """PEFT wraps it under its first name, and what calls it by the other one calls the base."""
        case = Case("", Twice, {"target_modules": ["first"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        with pytest.warns(UserWarning, match="'first': PEFT can compute .* what calls the layer as 'again'"):
            LoraModel.load_adapter(model, tmp_path)
        x = torch.ones(2, 4, dtype=torch.float64)
        torch.testing.assert_close(model(x), theirs.merge_and_unload()(x), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(("layer", "left_out"), SECOND_PATHS.values(), ids=SECOND_PATHS)
    def test_a_second_path_that_is_not_the_layer_is_said_when_written(self, layer, left_out, tmp_path):
        case = Case("", lambda: Single(layer()), {"target_modules": ["layer"]})
        lora = LoraModel(case.build(), LoraConfig(r=2, init="none", target_modules=["layer"]))
        with pytest.warns(UserWarning, match=rf"'layer': PEFT can compute something else before.*{left_out}\. "):
            lora.save_adapter(tmp_path / "new", format="peft")
        merged = read_by_peft(case, tmp_path / "new").merge_and_unload().layer.weight
        torch.testing.assert_close(lora.model.layer.weight.detach(), merged.detach(), rtol=0, atol=TOLERANCE)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
    def test_dropout_that_a_layer_cannot_honor_is_left_out_and_said(self, tmp_path):
        case = BY_ID["embedding and Conv1D"]
        theirs = with_peft(case, lora_dropout=0.1)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        with pytest.warns(UserWarning, match=r"loaded without its dropout of 0\.1"):
            LoraModel.load_adapter(model, tmp_path)
        assert difference(case, model, theirs) <= TOLERANCE

    def test_a_parameter_whose_rows_are_no_outputs_is_refused(self, tmp_path, untouched):
        """`Conv1D` of transformers keeps its inputs first; a square one would be loaded transposed."""

        class Square(nn.Module):
            def __init__(self):
                super().__init__()
                self.mixer = Conv1D(6, 6)

        case = Case("", Square, {"target_parameters": ["mixer.weight"], "target_modules": []})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, "'mixer.weight' is not the weight of a linear layer")


class TestSeveral:
    """A file is read onto a model that has adapters already, whose own values are not the base's."""

    def test_a_second_adapter(self, tmp_path):
        case = BY_ID["heads with statistics"]
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model = with_ours(case).model
        lora = LoraModel.load_adapter(model, tmp_path, "second")
        lora.set_adapter("second")
        assert difference(case, model, theirs) <= TOLERANCE

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_a_start_from_the_base_while_another_has_changed_it(self, init, tmp_path):
        theirs = with_peft(SINGLE, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        model = with_ours(SINGLE, init="pissa").model
        lora = LoraModel.load_adapter(model, tmp_path, "second")
        lora.set_adapter("second")
        assert difference(SINGLE, model, theirs) <= 1e-6  # float32
        lora.unload()
        assert difference(SINGLE, model, SINGLE.build()) == 0

    def test_both_are_written_against_the_base(self, tmp_path):
        lora = with_ours(LINEAR, init="pissa")
        lora.add_adapter("second", LoraConfig(r=2, target_modules=["fc"], init="olora"))
        for name in ("default", "second"):
            lora.set_adapter(name)
            lora.save_adapter(tmp_path / name, format="peft")
            assert difference(LINEAR, read_by_peft(LINEAR, tmp_path / name), lora.model) <= TOLERANCE

    def test_not_while_something_is_merged(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        lora = with_ours(LINEAR)
        lora.merge_adapter()
        with pytest.raises(StateError, match="is merged"):
            LoraModel.load_adapter(lora.model, tmp_path, "second")
        with pytest.raises(StateError, match="is merged"):
            lora.save_adapter(tmp_path / "new", format="peft")


class TestFolders:
    def test_named_adapters_are_in_subfolders(self, tmp_path, untouched):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(LINEAR.build(), peft.LoraConfig(r=2, target_modules=["fc"]), "night")
        model.add_adapter("rain", peft.LoraConfig(r=3, target_modules=["inner.fc"]))
        moved(model)
        model.save_pretrained(tmp_path)
        refused(LINEAR, tmp_path, untouched, "holds 2 adapters of PEFT: 'night', 'rain'")
        for name in ("night", "rain"):
            ours = LINEAR.build()
            LoraModel.load_adapter(ours, tmp_path / name)
            model.set_adapter(name)
            assert difference(LINEAR, ours, model.eval()) <= TOLERANCE

    def test_a_single_subfolder_is_found(self, tmp_path):
        peft = pytest.importorskip("peft")
        peft.get_peft_model(LINEAR.build(), peft.LoraConfig(target_modules=["fc"]), "night").save_pretrained(tmp_path)
        assert LoraModel.load_adapter(LINEAR.build(), tmp_path).active_adapters == ("night",)

    def test_the_file_of_tensors_means_its_folder(self, tmp_path):
        with_peft(LINEAR).save_pretrained(tmp_path)
        assert LoraModel.load_adapter(LINEAR.build(), tmp_path / TENSORS).active_adapters == ("default",)

    def test_a_pickle_is_refused(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
        (tmp_path / TENSORS).unlink()
        refused(LINEAR, tmp_path, untouched, r"adapter_model\.bin is a pickle.*save it again")

    def test_missing_tensors_are_said(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / TENSORS).unlink()
        refused(LINEAR, tmp_path, untouched, f"{CONFIG} and no {TENSORS}")


class TestConfigs:
    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            pytest.param({"peft_type": "LOHA"}, "PEFT's method 'LOHA'", id="method"),
            pytest.param({"lora_bias": True}, "lora_bias", id="lora_bias"),
            pytest.param({"trainable_token_indices": [1]}, "trainable_token_indices", id="tokens"),
            pytest.param({"layer_replication": [[0, 2]]}, "layer_replication", id="replication"),
            pytest.param({"kasa_config": {"a": 1}}, "kasa_config.*not known here", id="a field of a later version"),
        ],
    )
    def test_a_field_without_a_meaning_here_is_refused(self, fields, match, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_config(tmp_path, **fields)
        refused(LINEAR, tmp_path, untouched, match)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"peft_type": "LORA"', b"\xff\xfe"])
    def test_a_config_that_is_none(self, content, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / CONFIG).write_bytes(content)
        refused(LINEAR, tmp_path, untouched, CONFIG)


class TestHostileFiles:
    """Nothing is allocated that the file does not have."""

    def header(self, path, size, content=b"{}"):
        path.write_bytes(struct.pack("<Q", size) + content)

    def test_a_header_of_100_megabytes(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        with (tmp_path / TENSORS).open("wb") as file:
            file.write(struct.pack("<Q", 100 << 20))
            file.truncate(200 << 20)  # sparse
        refused(LINEAR, tmp_path, untouched, "its header would have 104,857,600 bytes")

    def test_a_header_longer_than_the_file(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        self.header(tmp_path / TENSORS, 1 << 60)
        refused(LINEAR, tmp_path, untouched, "its header would have")

    def test_an_index_of_100_gigabytes(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        shape = [100 << 30]
        entry = {"base_model.model.fc.lora_A.weight": {"dtype": "U8", "shape": shape, "data_offsets": [0, 100 << 30]}}
        content = json.dumps(entry).encode()
        self.header(tmp_path / TENSORS, len(content), content)
        refused(LINEAR, tmp_path, untouched, "damaged")

    def test_a_config_of_100_megabytes(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        with (tmp_path / CONFIG).open("wb") as file:
            file.truncate(100 << 20)
        refused(LINEAR, tmp_path, untouched, "at most 16,777,216 are read")

    def test_deeply_nested_json(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / CONFIG).write_text("[" * 100_000)
        refused(LINEAR, tmp_path, untouched, "cannot be read as JSON")
