"""Files of diffusers, both ways, against diffusers itself: UNet, text encoder and a diffusion transformer."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel
from lora_plugins.cli.main import main
from lora_plugins.formats import COMPONENTS
from tests.core.formats.peft_cases import moved, refused
from tests.core.formats.pipeline_cases import DIT, TEXT, TOLERANCE, UNET, parts, with_peft

FILE = "pytorch_lora_weights.safetensors"


def saved_by_diffusers(folder, metadata=True, **models):
    """Saves adapters of parts as the training scripts of diffusers do."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    mixin = diffusers.loaders.SD3LoraLoaderMixin if "transformer" in models else None
    mixin = mixin or diffusers.loaders.StableDiffusionLoraLoaderMixin
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
    said = _collate_lora_metadata(models) if metadata else {}
    mixin.save_lora_weights(folder, **layers, **said)


def read_by_diffusers(part, path):
    """The part with the adapter of a file, as diffusers reads it."""
    diffusers = pytest.importorskip("diffusers")
    model = part.build()
    if part is TEXT:  # diffusers goes through transformers 5.24, which wants a later PEFT than there is
        return read_by_peft(model, path / FILE)
    mixin = diffusers.loaders.SD3LoraLoaderMixin if part is DIT else diffusers.loaders.StableDiffusionLoraLoaderMixin
    found = mixin.lora_state_dict(str(path), return_lora_metadata=True)
    if part is DIT:
        state_dict, metadata = found
        mixin.load_lora_into_transformer(state_dict, transformer=model, metadata=metadata)
    else:
        state_dict, alphas, metadata = found
        mixin.load_lora_into_unet(state_dict, alphas, unet=model, metadata=metadata)
    return model.eval()


def read_by_peft(model, file):
    peft = pytest.importorskip("peft")
    from peft.utils import set_peft_model_state_dict

    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    fields = {key.removeprefix("text_encoder."): value for key, value in said.items()}
    tensors = {key.removeprefix("text_encoder."): tensor for key, tensor in load_file(file).items()}
    peft.inject_adapter_in_model(peft.LoraConfig(**fields), model)
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    return model


@parts
def test_what_diffusers_writes_is_read(part, tmp_path):
    theirs = with_peft(part, rank_pattern={part.targets[0]: 3}, alpha_pattern={part.targets[1]: 7})
    saved_by_diffusers(tmp_path, **{part.name: theirs})
    assert part.difference(part.build(), theirs) > 1e-3
    part.read_exactly(tmp_path, theirs)


@pytest.mark.parametrize("part", [UNET, DIT], ids=lambda part: part.name)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_a_denoiser_writes_by_itself_is_read(part, variant, tmp_path):
    """`save_lora_adapter` names no part, neither in keys nor in metadata."""
    fields = {"rank_pattern": {part.targets[0]: 3}, "alpha_pattern": {part.targets[1]: 7}}
    theirs = with_peft(part, use_dora=variant == "dora", **fields)
    theirs._hf_peft_config_loaded = True
    theirs.save_lora_adapter(tmp_path)
    alone, pipeline = part.build(), nn.ModuleDict({part.name: part.build(), "text_encoder": TEXT.build()})
    for model in (alone, pipeline):
        LoraModel.load_adapter(model, tmp_path)
    assert part.difference(alone, theirs) <= TOLERANCE
    assert part.difference(pipeline[part.name], theirs) <= TOLERANCE


def test_a_lost_order_of_patterns_is_told_of_a_file_that_is_inspected(tmp_path, capsys):
    patterns = {"to_q": 4, "attn1.to_q": 8}
    fields = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "alpha_pattern": patterns}
    layer = "unet.mid_block.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)},
        tmp_path / FILE,
        {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})},
    )
    assert main(["inspect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "to be said: alpha_pattern says [4, 8] of 'mid_block.attn1.to_q'." in told
    (row,) = [line.split() for line in told.splitlines() if line.startswith(layer)]
    assert row[2] == "4"


def test_without_part_metadata_and_alpha_the_rank_is_the_alpha_and_said(tmp_path):
    theirs = with_peft(UNET, lora_alpha=2)
    theirs._hf_peft_config_loaded = True
    theirs.save_lora_adapter(tmp_path)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE)
    model = UNET.build()
    with pytest.warns(UserWarning, match=r"no alpha.*the rank of each layer is taken"):
        LoraModel.load_adapter(model, tmp_path)
    assert UNET.difference(model, theirs) <= TOLERANCE


@parts
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_we_write_is_read_by_diffusers(part, variant, tmp_path):
    config = LoraConfig(
        r=2,
        alpha=5.0,
        target_modules=part.targets,
        variant=variant,
        rank_pattern={part.targets[0]: 4},
        alpha_pattern={part.targets[1]: 3.0},
    )
    lora = LoraModel(part.build(), config)
    moved(lora.model)
    lora.save_adapter(tmp_path, format="diffusers")
    theirs = read_by_diffusers(part, tmp_path)
    assert part.difference(part.build(), lora.model) > 1e-3
    assert part.difference(theirs, lora.model) <= TOLERANCE


def test_rslora_is_written_by_its_scaling(tmp_path):
    lora = LoraModel(UNET.build(), LoraConfig(r=4, alpha=5.0, target_modules=["to_q"], use_rslora=True))
    moved(lora.model)
    lora.save_adapter(tmp_path, format="diffusers")
    assert UNET.difference(read_by_diffusers(UNET, tmp_path), lora.model) <= TOLERANCE
    UNET.read_exactly(tmp_path, lora.model)


class TestMetadata:
    def test_without_it_the_rank_is_the_alpha(self, tmp_path):
        theirs = with_peft(UNET, lora_alpha=2)
        saved_by_diffusers(tmp_path, metadata=False, unet=theirs)
        UNET.read_exactly(tmp_path, theirs)

    def test_it_is_what_tells_the_alpha(self, tmp_path):
        theirs = with_peft(UNET, lora_alpha=9, use_rslora=True)
        saved_by_diffusers(tmp_path, unet=theirs)
        UNET.read_exactly(tmp_path, theirs)

    def test_a_training_that_goes_on_has_its_dropout(self, tmp_path):
        config = LoraConfig(r=2, dropout=0.125, target_modules=["to_q"])
        LoraModel(UNET.build(), config).save_adapter(tmp_path, format="diffusers")
        assert LoraModel.load_adapter(UNET.build(), tmp_path).adapters["default"].dropout == 0.125

    def test_a_missing_layer_is_listed(self, tmp_path, untouched):
        saved_by_diffusers(tmp_path, unet=with_peft(UNET))
        with safe_open(tmp_path / FILE, "pt") as file:
            metadata = file.metadata()
        tensors = {key: tensor for key, tensor in load_file(tmp_path / FILE).items() if "conv_in" not in key}
        save_file(tensors, tmp_path / FILE, metadata)
        refused(UNET, tmp_path, untouched, r"has no A and B for: 'conv_in'")


ENDINGS = {
    "PEFT's": {},
    "lora.down": {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"},
    "lora_linear_layer": {
        ".lora_A.weight": ".lora_linear_layer.down.weight",
        ".lora_B.weight": ".lora_linear_layer.up.weight",
    },
    "processor": {
        f"{name}.lora_{factor}.weight": f"processor.{name.partition('.')[0]}_lora.{direction}.weight"
        for name in ("to_q", "to_v", "to_out.0")
        for factor, direction in (("A", "down"), ("B", "up"))
    },
}


def renamed(path, endings):
    tensors = load_file(path)
    for new, old in endings.items():
        tensors = {key.removesuffix(new) + old if key.endswith(new) else key: t for key, t in tensors.items()}
    save_file(tensors, path)


@pytest.mark.parametrize("endings", ENDINGS.values(), ids=ENDINGS)
def test_all_endings_over_the_years_are_read(endings, tmp_path):
    theirs = with_peft(UNET, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"])
    saved_by_diffusers(tmp_path, metadata=False, unet=theirs)
    renamed(tmp_path / FILE, endings)
    UNET.read_exactly(tmp_path, theirs)


def test_the_norms_of_dora_in_ai_toolkit_are_read(tmp_path):
    theirs = with_peft(UNET, lora_alpha=2, use_dora=True)
    saved_by_diffusers(tmp_path, metadata=False, unet=theirs)
    renamed(tmp_path / FILE, {".lora_magnitude_vector": ".magnitude"})
    assert any(key.endswith(".magnitude") for key in load_file(tmp_path / FILE))
    UNET.read_exactly(tmp_path, theirs)


def test_the_oldest_keys_of_text_encoders_are_read(tmp_path):
    """They have the names of the UNet's projections, as `convert_state_dict_to_peft` of diffusers knows."""
    theirs = with_peft(TEXT, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    saved_by_diffusers(tmp_path, metadata=False, text_encoder=theirs)
    endings = {
        f"{name}.lora_{factor}.weight": f"to_{name.partition('_')[0]}_lora.{direction}.weight"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        for factor, direction in (("A", "down"), ("B", "up"))
    }
    renamed(tmp_path / FILE, endings)
    TEXT.read_exactly(tmp_path, theirs)


def test_names_of_transformers_4_are_read(tmp_path):
    """All text encoders of Stable Diffusion that were trained before have a `text_model` in their names."""
    theirs = with_peft(TEXT, lora_alpha=2)
    saved_by_diffusers(tmp_path, metadata=False, text_encoder=theirs)
    tensors = load_file(tmp_path / FILE)
    save_file(
        {k.replace("encoder.layers", "text_model.encoder.layers"): t for k, t in tensors.items()}, tmp_path / FILE
    )
    TEXT.read_exactly(tmp_path, theirs)


class TestParts:
    @pytest.fixture
    def both(self, tmp_path):
        """A file with two parts, and the models that it is of."""
        models = {"unet": with_peft(UNET), "text_encoder": with_peft(TEXT, lora_alpha=3)}
        saved_by_diffusers(tmp_path, **models)
        return tmp_path, models

    def test_one_has_to_be_chosen(self, both, untouched):
        folder, models = both
        model = UNET.build()
        with untouched(model), pytest.raises(AdapterFileError, match=r"the parts 'text_encoder', 'unet'.*'component'"):
            LoraModel.load_adapter(model, folder)
        LoraModel.load_adapter(model, folder, format_options={"component": "unet"})
        assert UNET.difference(model, models["unet"]) <= TOLERANCE

    def test_all_are_read_into_a_module_of_them(self, both, tmp_path):
        folder, models = both
        pipe = nn.ModuleDict({"unet": UNET.build(), "text_encoder": TEXT.build()})
        lora = LoraModel.load_adapter(pipe, folder)
        assert UNET.difference(pipe["unet"], models["unet"]) <= TOLERANCE
        assert TEXT.difference(pipe["text_encoder"], models["text_encoder"]) <= TOLERANCE
        lora.save_adapter(tmp_path / "again", format="diffusers")
        assert UNET.difference(read_by_diffusers(UNET, tmp_path / "again"), models["unet"]) <= TOLERANCE

    def test_all_that_diffusers_writes_adapters_of_are_known(self):
        loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
        mixins = [each for each in vars(loaders).values() if hasattr(each, "_lora_loadable_modules")]
        written = {part for mixin in mixins for part in mixin._lora_loadable_modules}
        assert {"unet", "transformer", "text_encoder"} < written <= {*COMPONENTS}

    def test_one_beside_the_denoiser(self, tmp_path):
        def build():
            return nn.ModuleDict({"transformer": DIT.build(), "connectors": nn.Sequential(nn.Linear(4, 4))})

        lora = LoraModel(build(), LoraConfig(r=2, target_modules=["to_q", "0"]))
        moved(lora.model)
        lora.save_adapter(tmp_path / "file", format="diffusers")
        model = build()
        adapted = {layer.name for layer in LoraModel.load_adapter(model, tmp_path / "file").plans["default"].layers}
        assert "connectors.0" in adapted
        assert DIT.difference(model["transformer"], lora.model["transformer"]) == 0

    @pytest.mark.parametrize("other", ["transformer_2", "transformer_ref"])
    @pytest.mark.parametrize("keys", ["transformer.", "diffusion_model."])
    def test_a_file_of_the_first_transformer_goes_into_another(self, other, keys, tmp_path):
        """As diffusers does it by `load_into_transformer_ref=True`, or where a pipeline has no first one."""
        theirs = with_peft(DIT, lora_alpha=2)  # as the rank is, which is what a file without metadata means
        saved_by_diffusers(tmp_path, metadata=False, transformer=theirs)
        tensors = load_file(tmp_path / FILE)
        save_file({key.replace("transformer.", keys, 1): tensor for key, tensor in tensors.items()}, tmp_path / FILE)
        alone = nn.ModuleDict({other: DIT.build(), "text_encoder": TEXT.build()})
        first, both = (nn.ModuleDict({"transformer": DIT.build(), other: DIT.build()}) for _ in range(2))
        LoraModel.load_adapter(alone, tmp_path)
        LoraModel.load_adapter(first, tmp_path)
        LoraModel.load_adapter(both, tmp_path, format_options={"component": other})
        assert DIT.difference(alone[other], theirs) <= TOLERANCE
        assert DIT.difference(both[other], theirs) <= TOLERANCE
        assert DIT.difference(both["transformer"], DIT.build()) == 0
        assert DIT.difference(first["transformer"], theirs) <= TOLERANCE
        assert DIT.difference(first[other], DIT.build()) == 0

    def test_one_that_the_file_does_not_have(self, both):
        folder, _ = both
        with pytest.raises(AdapterFileError, match="no part 'transformer'"):
            LoraModel.load_adapter(DIT.build(), folder, format_options={"component": "transformer"})
        with pytest.raises(ConfigError, match=r"component is 'unit'\. Did you mean 'unet'"):
            LoraModel.load_adapter(UNET.build(), folder, format_options={"component": "unit"})

    def test_one_that_the_model_does_not_have(self, both):
        with pytest.raises(AdapterFileError, match="has the parts 'text_encoder', which the model does not have"):
            LoraModel.load_adapter(nn.ModuleDict({"unet": UNET.build()}), both[0])

    def test_parts_that_were_started_in_different_ways(self, both):
        folder, _ = both
        with safe_open(folder / FILE, "pt") as file:
            said = json.loads(file.metadata()["lora_adapter_metadata"])
        said["unet.init_lora_weights"] = "pissa"
        save_file(load_file(folder / FILE), folder / FILE, {"lora_adapter_metadata": json.dumps(said), "format": "pt"})
        pipe = nn.ModuleDict({"unet": UNET.build(), "text_encoder": TEXT.build()})
        with pytest.raises(AdapterFileError, match="started in different ways: 'kaiming', 'pissa'"):
            LoraModel.load_adapter(pipe, folder)

    def test_one_without_layers_is_not_written(self, tmp_path):
        pipe = nn.ModuleDict({"unet": UNET.build(), "text_encoder": TEXT.build()})
        lora = LoraModel(pipe, LoraConfig(target_modules=["unet.conv_in"]))
        with pytest.raises(ConfigError, match="has no layers in 'text_encoder'"):
            lora.save_adapter(tmp_path / "new", format="diffusers", format_options={"component": "text_encoder"})

    def test_one_with_a_module_that_is_called_like_another_one(self, tmp_path):
        model = nn.ModuleDict({"transformer": nn.ModuleDict({"fc": nn.Linear(3, 3)})})
        again, options = copy.deepcopy(model), {"component": "text_encoder"}
        LoraModel(model, LoraConfig(r=2, init="none")).save_adapter(
            tmp_path / "new", format="diffusers", format_options=options
        )
        keys = load_file(tmp_path / "new" / FILE)
        assert all(key.startswith("text_encoder.transformer.fc.") for key in keys)
        LoraModel.load_adapter(again, tmp_path / "new", format_options=options)
        assert torch.equal(again["transformer"]["fc"].weight, model["transformer"]["fc"].weight)

    def test_two_that_no_file_has_both(self, tmp_path):
        pipe = nn.ModuleDict({"transformer": DIT.build(), "transformer_2": DIT.build()})
        lora = LoraModel(pipe, LoraConfig(target_modules=["to_q"]))
        with pytest.raises(
            ConfigError, match="No file of this format has layers of 'transformer' and of 'transformer_2'"
        ):
            lora.save_adapter(tmp_path / "new", format="diffusers")
        lora.save_adapter(tmp_path / "new", format="diffusers", format_options={"component": "transformer_2"})
        assert {key.partition(".")[0] for key in load_file(tmp_path / "new" / FILE)} == {"transformer"}

    def test_a_model_of_which_it_cannot_be_told(self, tmp_path):
        lora = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig())
        with pytest.raises(ConfigError, match=r"format_options=\{'component': 'unet'\}.*a VAE .*, write format='peft'"):
            lora.save_adapter(tmp_path / "new", format="diffusers")
        assert not (tmp_path / "new").exists()


class TestRefused:
    def test_what_is_trained_in_full(self, tmp_path):
        lora = LoraModel(TEXT.build(), LoraConfig(target_modules=["q_proj"], modules_to_save=["final_layer_norm"]))
        with pytest.raises(AdapterFileError, match=r"'final_layer_norm\.weight': what is trained in full"):
            lora.save_adapter(tmp_path / "new", format="diffusers")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("key", "again"),
        [
            ("lora_A.weight", "lora.down.weight"),
            ("lora_A.weight", "lora_A.second.weight"),
            ("dora_scale", "lora_magnitude_vector"),
        ],
        ids=["in another spelling", "of another adapter", "in another form"],
    )
    def test_a_key_that_says_it_again(self, key, again, tmp_path, untouched):
        saved_by_diffusers(tmp_path, metadata=False, unet=with_peft(UNET))
        repeated = {f"unet.conv_in.{end}": torch.ones(8, 1, 1, 1) for end in (key, again)}
        save_file({**repeated, **load_file(tmp_path / FILE)}, tmp_path / FILE)
        first, second = sorted(repeated)
        refused(
            UNET,
            tmp_path,
            untouched,
            f"one tensor .* under several keys.* '{first}', '{second}'.* all but one",
        )

    def test_layers_of_several_adapters(self, tmp_path, untouched):
        saved_by_diffusers(tmp_path, metadata=False, unet=with_peft(UNET))
        named = {
            key.replace(".weight", f".{'second' if 'conv_in' in key else 'first'}.weight"): tensor
            for key, tensor in load_file(tmp_path / FILE).items()
        }
        save_file(named, tmp_path / FILE)
        refused(UNET, tmp_path, untouched, "layers of the adapters 'first', 'second'.* a file of its own")

    @pytest.mark.parametrize(
        "others",
        [
            ["a.lora_A.first.weight", "b.lora_A.second.weight"],
            ["a.lora_A.first.weight", "a.lora_A.second.weight"],
            ["a.lora_A.weight"],
        ],
        ids=["several adapters", "several adapters of a layer", "half a layer"],
    )
    def test_not_for_a_part_that_is_left_out(self, others, tmp_path, untouched):
        expected = with_peft(UNET, lora_alpha=2)
        saved_by_diffusers(tmp_path, metadata=False, unet=expected)
        beside = {f"text_encoder.{key}": torch.ones(1, 4) for key in others}
        save_file({**load_file(tmp_path / FILE), **beside}, tmp_path / FILE)
        model = UNET.build()
        LoraModel.load_adapter(model, tmp_path, format_options={"component": "unet"})
        assert UNET.difference(model, expected) <= TOLERANCE
        with untouched(encoder := TEXT.build()), pytest.raises(AdapterFileError):
            LoraModel.load_adapter(encoder, tmp_path, format_options={"component": "text_encoder"})

    def test_a_key_that_is_left_over(self, tmp_path, untouched):
        saved_by_diffusers(tmp_path, metadata=False, unet=with_peft(UNET))
        save_file({**load_file(tmp_path / FILE), "unet.more": torch.zeros(1)}, tmp_path / FILE)
        refused(UNET, tmp_path, untouched, r"1 key .* no place: 'unet\.more'")

    @pytest.mark.parametrize(("key", "method"), [("conv_in.lokr_w1", "LoKr"), ("conv_in.a1.weight", "GLoRA")])
    def test_other_methods(self, key, method, tmp_path, untouched):
        saved_by_diffusers(tmp_path, metadata=False, unet=with_peft(UNET))
        save_file({**load_file(tmp_path / FILE), f"unet.{key}": torch.zeros(1)}, tmp_path / FILE)
        refused(UNET, tmp_path, untouched, f"is of '{method}', .*: 'unet.{key}'")

    def test_layers_of_no_part_beside_a_denoiser(self, tmp_path, untouched):
        saved_by_diffusers(tmp_path, metadata=False, unet=with_peft(UNET))
        other = {
            "vae.conv_in.lora_A.weight": torch.ones(1, 3, 3, 3),
            "vae.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1),
            "vae.conv_in.alpha": torch.tensor(1.0),
        }
        save_file({**load_file(tmp_path / FILE), **other}, tmp_path / FILE)
        match = r"of the denoiser, and others with no known part .*\('vae\.conv_in'\).*Take them out"
        refused(UNET, tmp_path, untouched, match)

    def test_half_a_layer(self, tmp_path, untouched):
        saved_by_diffusers(tmp_path, metadata=False, unet=with_peft(UNET))
        tensors = load_file(tmp_path / FILE)
        del tensors["unet.conv_in.lora_B.weight"]
        save_file(tensors, tmp_path / FILE)
        refused(UNET, tmp_path, untouched, "'conv_in' of the adapter has only A")
