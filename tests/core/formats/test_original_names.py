"""Files with the names of the implementations in which models were published, against diffusers, which converts those.

The names and the order of rows are held against its converters of whole checkpoints, on models of the published sizes
that have no memory; what is computed is held against its loaders of adapters.
"""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel
from lora_plugins.formats import convert
from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.kohya import KohyaFormat
from lora_plugins.formats.original_names import original_places
from tests.core.formats.pipeline_cases import TEXT, TOLERANCE, UNET, Part
from tests.slow import thinned

DIFFUSERS = DiffusersFormat()
ANY = 21504  # outputs of the largest layer of Flux, which its converter splits


def sdxl():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd15():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(cross_attention_dim=768)


def flux():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def sd35():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def published(name, **fields):
    """A function that makes a model of a published size, except for the number of its blocks."""

    def build():
        return getattr(pytest.importorskip("diffusers"), name)(**fields)

    build.__name__ = name
    return build


CONVERTERS = {
    sdxl: "convert_ldm_unet_checkpoint",
    sd15: "convert_ldm_unet_checkpoint",
    flux: "convert_flux_transformer_checkpoint_to_diffusers",
    sd35: "convert_sd3_transformer_checkpoint_to_diffusers",
    published("AuraFlowTransformer2DModel", num_mmdit_layers=2, num_single_dit_layers=2): (
        "convert_auraflow_transformer_checkpoint_to_diffusers"
    ),
    published("ChromaTransformer2DModel", num_layers=2, num_single_layers=2): (
        "convert_chroma_transformer_checkpoint_to_diffusers"
    ),
    published("Flux2Transformer2DModel", num_layers=2, num_single_layers=2): (
        "convert_flux2_transformer_checkpoint_to_diffusers"
    ),
    published("HunyuanVideoFramepackTransformer3DModel", num_layers=2, num_single_layers=2): (
        "convert_hunyuan_video_transformer_to_diffusers"
    ),
    published("HunyuanVideoTransformer3DModel", num_layers=2, num_single_layers=2): (
        "convert_hunyuan_video_transformer_to_diffusers"
    ),
    published("LTXVideoTransformer3DModel", num_layers=2): "convert_ltx_transformer_checkpoint_to_diffusers",
    published("Lumina2Transformer2DModel", num_layers=2): "convert_lumina2_to_diffusers",
    published("MiniMaxH3Transformer3DModel", num_layers=2): "convert_minimax_h3_transformer_checkpoint_to_diffusers",
    published("MochiTransformer3DModel"): "convert_mochi_transformer_checkpoint_to_diffusers",
    published("SanaTransformer2DModel", num_layers=2): "convert_sana_transformer_to_diffusers",
    published("WanTransformer3DModel", num_layers=2, image_dim=1280, added_kv_proj_dim=5120): (
        "convert_wan_transformer_to_diffusers"
    ),
    published("WanVACETransformer3DModel", num_layers=2, vace_layers=[0, 1]): "convert_wan_transformer_to_diffusers",
    published("ZImageTransformer2DModel", n_layers=2): "convert_z_image_transformer_checkpoint_to_diffusers",
}


class Checkpoint(dict):
    """A checkpoint in which everything is that a converter asks for; what was not put in is zero."""

    def __missing__(self, key):
        return torch.zeros(ANY)

    def pop(self, key, *_):
        return super().pop(key) if key in self else self[key]


def weights_of(model):
    """The layers that can be adapted, and how many outputs each has."""
    return {name: len(module.weight) for name, module in model.named_modules() if is_layer(module)}


def norms_of(model):
    """The norms with weights, and how many each has."""
    named = {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}
    return {name: len(module.weight) for name, module in named.items() if getattr(module, "weight", None) is not None}


def factors_of(model, outputs):
    """A random B for the first original name of each layer, with the rows of all layers that are in it."""
    factors, seen = {}, set()
    for original, place in original_places(model).items():
        if seen.isdisjoint(place.names) and all(name in outputs for name in place.names):
            factors[original] = torch.randn(sum(outputs[name] for name in place.names), 1)
            seen |= {*place.names}
    return factors


def is_layer(module):
    return isinstance(module, nn.Linear | nn.Conv2d)


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed. is deprecated:FutureWarning")  # by diffusers' own Chroma
@pytest.mark.parametrize("build", CONVERTERS, ids=lambda build: build.__name__)
def test_every_layer_has_its_rows_of_what_the_converter_of_checkpoints_takes(build, tmp_path):
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    with torch.device("meta"):
        model = build()
    norms = norms_of(model)
    outputs = weights_of(model) | norms
    factors = factors_of(model, outputs)
    of_norms = {name for name, place in original_places(model).items() if norms.keys() >= {*place.names}}
    file = {
        f"lora_unet_{name.replace('.', '_')}.{key}": value
        for name, B in factors.items()
        for key, value in (
            {"w_norm": B} if name in of_norms else {"lora_down.weight": torch.ones(1, 1), "lora_up.weight": B}
        ).items()
    }
    save_file(file, tmp_path / "adapter.safetensors")
    adapter = KohyaFormat().load(tmp_path / "adapter.safetensors", model, {"component": None})
    found = {name: layer.B for name, layer in adapter.layers.items()}
    found |= {name.removesuffix(".weight"): change for name, change in adapter.changes.items()}

    start = "model.diffusion_model." if "unet" in CONVERTERS[build] else ""
    names = [f"{name}.{kind}" for name in original_places(model) for kind in ("weight", "bias")]
    checkpoint = Checkpoint({start + name: torch.zeros(1) for name in names if start})
    checkpoint |= {f"{start}{name}.{kind}": B for name, B in factors.items() for kind in ("weight", "scale")}
    same_in_both = {} if start else {name: torch.randn(size, 1) for name, size in outputs.items() if name not in found}
    checkpoint |= {f"{name}.{kind}": B for name, B in same_in_both.items() for kind in ("weight", "scale")}
    converted = getattr(utilities, CONVERTERS[build])(checkpoint, config=model.config)

    rows = found | same_in_both
    assert rows.keys() == outputs.keys()
    assert not [name for name in same_in_both if name.endswith(("norm_q", "norm_k"))]
    for name, B in rows.items():
        assert torch.equal(B, converted[f"{name}.weight"]), name


ADAPTER_CONVERTERS = {
    published("AnyFlowTransformer3DModel", num_layers=2): "WanLoraLoaderMixin",
    published("ChronoEditTransformer3DModel", num_layers=2, image_dim=64, added_kv_proj_dim=64): "WanLoraLoaderMixin",
    published("CosmosTransformer3DModel", num_layers=2): "AnimaLoraLoaderMixin",
    published("Flux3Transformer2DModel", num_layers=2, num_single_layers=2): "Flux3LoraLoaderMixin",
    published("HeliosTransformer3DModel", num_layers=2): "HeliosLoraLoaderMixin",
    published("Ideogram4Transformer2DModel", num_layers=2): "Ideogram4LoraLoaderMixin",
    published("Krea2Transformer2DModel", num_layers=2): "Krea2LoraLoaderMixin",
    published("LTX2VideoTransformer3DModel", num_layers=2): "LTX2LoraLoaderMixin",
    published("MiniMaxH3Transformer3DModel", num_layers=2): "MiniMaxH3LoraLoaderMixin",
    published("WanAnimateTransformer3DModel", num_layers=2): "WanLoraLoaderMixin",
}
"""Models of which diffusers converts adapters, and not whole checkpoints by what can be asked."""


@pytest.mark.parametrize("build", ADAPTER_CONVERTERS, ids=lambda build: build.__name__)
def test_every_layer_has_its_rows_of_what_the_converter_of_adapters_takes(build, tmp_path):
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    with torch.device("meta"):
        model = build()
    outputs = weights_of(model)
    factors = factors_of(model, outputs)
    file = {
        f"diffusion_model.{name}.{key}.weight": value
        for name, B in factors.items()
        for key, value in {"lora_A": torch.ones(1, 1), "lora_B": B}.items()
    }
    path = tmp_path / "adapter.safetensors"
    save_file(file, path)
    converted = getattr(loaders, ADAPTER_CONVERTERS[build]).lora_state_dict(str(path))
    found = DiffusersFormat().load(path, model, DiffusersFormat.options).layers
    assert factors
    assert {f"transformer.{name}.lora_{key}.weight" for name in found for key in "AB"} == converted.keys()
    for name, layer in found.items():
        assert torch.equal(layer.B, converted[f"transformer.{name}.lora_B.weight"]), name


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
NOT_CONVERTED = {
    published(
        "HunyuanImageTransformer2DModel", num_layers=1, num_single_layers=1, guidance_embeds=True, text_embed_2_dim=8
    ): {
        "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.{name}" for name in QKV],
        "single_blocks.0.linear1": [f"single_transformer_blocks.0.{name}" for name in (*QKV, "proj_mlp")],
        "guidance_in.mlp.2": ["time_guidance_embed.guidance_embedder.linear_2"],
        "byt5_in.fc3": ["context_embedder_2.linear_3"],
    },
    published("HunyuanVideo15Transformer3DModel", num_layers=1): {
        "double_blocks.0.img_attn_q": ["transformer_blocks.0.attn.to_q"],
        "double_blocks.0.txt_attn_v": ["transformer_blocks.0.attn.add_v_proj"],
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.{name}" for name in QKV],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
        "time_in.mlp.0": ["time_embed.timestep_embedder.linear_1"],
        "vision_in.proj.3": ["image_embedder.linear_2"],
    },
    published("PixArtTransformer2DModel", num_layers=1, caption_channels=8, use_additional_conditions=True): {
        "blocks.0.attn.qkv": [f"transformer_blocks.0.attn1.to_{name}" for name in "qkv"],
        "blocks.0.cross_attn.kv_linear": [f"transformer_blocks.0.attn2.to_{name}" for name in "kv"],
        "blocks.0.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
        "ar_embedder.mlp.0": ["adaln_single.emb.aspect_ratio_embedder.linear_1"],
        "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
    },
    published("SanaVideoTransformer3DModel", num_layers=1): {
        "x_embedder.proj": ["patch_embedding"],
        "blocks.0.attn.q_norm": ["transformer_blocks.0.attn1.norm_q"],
        "blocks.0.cross_attn.k_norm": ["transformer_blocks.0.attn2.norm_k"],
        "blocks.0.mlp.t_conv": ["transformer_blocks.0.ff.conv_temp"],
    },
}
"""Models that diffusers converts by scripts alone, and some of their original names."""


@pytest.mark.parametrize("build", NOT_CONVERTED, ids=lambda build: build.__name__)
def test_every_layer_has_a_name_where_no_converter_can_be_asked(build):
    with torch.device("meta"):
        model = build()
    places = original_places(model)
    assert {name for place in places.values() for name in place.names} >= weights_of(model).keys()
    for original, names in NOT_CONVERTED[build].items():
        assert [*places[original].names] == names
    assert {name for name, place in places.items() if place.swapped} <= {"final_layer.adaLN_modulation.1"}


@pytest.mark.parametrize(
    ("build", "own", "other"),
    [
        (published("CosmosTransformer3DModel", num_layers=1), "final_layer.linear", "net.final_layer.linear"),
        (published("CosmosTransformer3DModel", num_layers=1), "blocks.0.mlp.layer1", "net.blocks.0.mlp.layer1"),
        *(
            (published(hunyuan, num_layers=1, num_single_layers=1), own, of_comfy)
            for hunyuan in ("HunyuanImageTransformer2DModel", "HunyuanVideoTransformer3DModel")
            for own, of_comfy in {
                "double_blocks.0.txt_attn_qkv": "double_blocks.0.txt_attn.qkv",
                "double_blocks.0.img_mlp.fc1": "double_blocks.0.img_mlp.0",
                "double_blocks.0.img_mod.linear": "double_blocks.0.img_mod.lin",
                "single_blocks.0.modulation.linear": "single_blocks.0.modulation.lin",
                "time_in.mlp.2": "time_in.out_layer",
                "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
                "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
                "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (
                    "txt_in.individual_token_refiner.blocks.0.self_attn.qkv"
                ),
                "txt_in.individual_token_refiner.blocks.0.mlp.fc2": "txt_in.individual_token_refiner.blocks.0.mlp.2",
            }.items()
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_some_layers_have_a_second_original_name(build, own, other):
    with torch.device("meta"):
        places = original_places(build())
    assert places[own] == places[other]


def test_the_norms_of_krea_2_have_a_name():
    """Its converter takes adapters of linear layers alone."""
    with torch.device("meta"):
        model = published("Krea2Transformer2DModel", num_layers=1)()
    places = original_places(model)
    assert {name for place in places.values() for name in place.names} >= norms_of(model).keys()
    expected = {
        "blocks.0.attn.qknorm.knorm": "transformer_blocks.0.attn.norm_k",
        "blocks.0.prenorm": "transformer_blocks.0.norm1",
        "txtfusion.refiner_blocks.0.postnorm": "text_fusion.refiner_blocks.0.norm2",
        "txtmlp.0": "txt_in.norm",
        "last.norm": "final_layer.norm",
    }
    for original, name in expected.items():
        assert [*places[original].names] == [name]


def stable_cascade():
    return pytest.importorskip("diffusers").StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_pooled_in_channels=16,
    )


@pytest.mark.parametrize("start", ["prior.", "diffusion_model.", "lora_prior_unet_", "lora_unet_"])
@pytest.mark.parametrize(
    "names",
    [
        ["attn.to_q", "attn.to_k", "attn.to_v", "attn.out_proj"],
        ["attn.in_proj.0", "attn.in_proj.1", "attn.in_proj.2", "attn.out_proj"],
        ["to_q", "to_k", "to_v", "to_out.0"],
    ],
    ids=["of ComfyUI", "of OneTrainer", "of diffusers"],
)
def test_attentions_of_stable_cascade(names, start, tmp_path):
    with torch.device("meta"):
        model = stable_cascade()
    files = {name for name, _ in model.named_modules() if name.endswith(".attention")}
    file, expected = {}, {}
    for attention in files:
        for own, name in zip(["to_q", "to_k", "to_v", "to_out.0"], names, strict=True):
            key, B = f"{attention}.{name}", torch.randn(16, 1)
            key = start + (key.replace(".", "_") if start.endswith("_") else key)
            file |= {f"{key}.lora_down.weight": torch.ones(1, 16), f"{key}.lora_up.weight": B}
            file[f"{key}.alpha"] = torch.tensor(1.0)
            expected[f"{attention}.{own}"] = B
    path = tmp_path / "adapter.safetensors"
    save_file(file, path)
    reader = KohyaFormat() if start.endswith("_") else DIFFUSERS
    layers = reader.load(path, model, reader.options).layers
    assert layers.keys() == expected.keys()
    assert len(files) == 6
    for name, B in expected.items():
        assert torch.equal(layers[name].B, B), name


def test_the_denoiser_of_ideogram_4_has_another_name_in_files_that_diffusers_reads(tmp_path):
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    with torch.device("meta"):
        model = published("Ideogram4Transformer2DModel", num_layers=1)()
    path = tmp_path / "adapter.safetensors"
    start = "conditional_transformer.layers.0.attention"
    tensors = {"qkv.lora_A": torch.ones(1, 4), "qkv.lora_B": torch.randn(3 * 4608, 1)}
    tensors |= {"o.lora_A": torch.ones(1, 4), "o.lora_B": torch.randn(4608, 1)}
    save_file({f"{start}.{key}.weight": tensor for key, tensor in tensors.items()}, path)
    converted = loaders.Ideogram4LoraLoaderMixin.lora_state_dict(str(path))
    layers = DIFFUSERS.load(path, model, DIFFUSERS.options).layers
    assert {f"transformer.{name}.lora_{key}.weight" for name in layers for key in "AB"} == converted.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.B, converted[f"transformer.{name}.lora_B.weight"]), name


@pytest.mark.parametrize(
    ("build", "mangled"),
    [
        (
            published("ZImageTransformer2DModel", n_layers=1, n_refiner_layers=1),
            {
                "context.refiner.0.attention.to_q": "context_refiner.0.attention.to_q",
                "noise.refiner.0.adaLN.modulation.0": "noise_refiner.0.adaLN_modulation.0",
            },
        ),
        (
            published("FluxTransformer2DModel", num_layers=1, num_single_layers=1),
            {"double_blocks.0.img_attn_proj": "transformer_blocks.0.attn.to_out.0"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dots_that_converters_put_for_underscores(build, mangled, tmp_path):
    """As in those of musubi-tuner's `convert_lora.py --target other`."""
    with torch.device("meta"):
        model = build()
    file = {f"diffusion_model.{name}.lora_{key}.weight": torch.ones(1, 1) for name in mangled for key in "AB"}
    save_file(file, tmp_path / "adapter.safetensors")
    layers = DIFFUSERS.load(tmp_path / "adapter.safetensors", model, DIFFUSERS.options).layers
    assert layers.keys() == {*mangled.values()}


def test_both_transformers_of_wan_in_one_file(tmp_path):
    """As ai-toolkit writes them with `split_multistage_loras: false`."""
    diffusers = pytest.importorskip("diffusers")
    names = [f"diffusion_model.transformer_{n}.blocks.0.self_attn.q" for n in (1, 2)]
    file = {f"{name}.lora_{key}.weight": torch.ones(1, 1) for name in names for key in "AB"}
    save_file(file, tmp_path / "adapter.safetensors")
    with torch.device("meta"):
        parts = {name: diffusers.WanTransformer3DModel(num_layers=1) for name in ("transformer", "transformer_2")}
    layers = DIFFUSERS.load(tmp_path / "adapter.safetensors", nn.ModuleDict(parts), DIFFUSERS.options).layers
    assert layers.keys() == {f"{part}.blocks.0.attn1.to_q" for part in parts}


class TestMiniMaxH3:
    @pytest.fixture
    def model(self):
        return pytest.importorskip("diffusers").MiniMaxH3Transformer3DModel(
            num_layers=1, num_refiner_layers=1, num_attention_heads=2, attention_head_dim=128, hidden_size=8, ffn_dim=8
        )

    @pytest.mark.parametrize(
        "derived", [pytest.param(False, marks=pytest.mark.slow), True], ids=["its class", "a class of it"]
    )
    @pytest.mark.parametrize("key", ["blocks.0.attn.qkv_proj", "token_refiner.blocks.0.attn.qkv_proj"])
    def test_rows_that_alternate_by_head_are_refused(self, key, derived, model, tmp_path, untouched):
        """diffusers, which knows them by the name of PEFT's adapter too, puts them in order."""
        if derived:
            model.__class__ = type("Derived", (type(model),), {})
        B = torch.cat([torch.full((128, 1), n) for n in (1.0, 3.0, 5.0, 2.0, 4.0, 6.0)])
        path, ordered = tmp_path / "adapter.safetensors", tmp_path / "ordered.safetensors"
        save_file({f"{key}.lora_A.default.weight": torch.ones(1, 8), f"{key}.lora_B.default.weight": B}, path)
        with untouched(model), pytest.raises(AdapterFileError, match=r"one head after the other.* save_file of"):
            LoraModel.load_adapter(model, path)
        loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
        save_file(loaders.MiniMaxH3LoraLoaderMixin.lora_state_dict(str(path)), ordered)
        layers = DIFFUSERS.load(ordered, model, DIFFUSERS.options).layers.items()
        rows = {name.rpartition("_")[2]: [*layer.B[::128].flatten()] for name, layer in layers}
        assert rows == {"q": [1, 2], "k": [3, 4], "v": [5, 6]}

    @pytest.fixture
    def tensors(self):
        names = ["diffusion_model.blocks.0.attn.out_proj", "diffusion_model.blocks.0.mlp.fc2"]
        shapes = {"lora_A": {names[0]: (2, 256), names[1]: (2, 8)}, "lora_B": dict.fromkeys(names, (8, 2))}
        return {
            f"{name}.{factor}.weight": torch.ones(shape)
            for factor, of_names in shapes.items()
            for name, shape in of_names.items()
        }

    @pytest.mark.parametrize(("said", "alpha"), [("4", 4.0), ("many", 2.0), (None, 2.0)])
    def test_an_alpha_of_all_layers_is_that_of_the_header(self, said, alpha, model, tensors, tmp_path):
        """As diffusers takes it, for this model alone."""
        path = tmp_path / "adapter.safetensors"
        save_file(tensors, path, None if said is None else {"alpha": said})
        loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
        _, config = loaders.MiniMaxH3LoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
        assert alpha == (2 if config is None else config["transformer.lora_alpha"])
        layers = LoraModel.load_adapter(model, path).plans["default"].layers
        assert [layer.alpha for layer in layers] == [alpha, alpha]

    def test_alphas_of_layers_come_before_that_of_the_header(self, model, tensors, tmp_path):
        """Of another layer the rank counts then: diffusers does not read the header."""
        path = tmp_path / "adapter.safetensors"
        save_file(tensors | {"diffusion_model.blocks.0.attn.out_proj.alpha": torch.tensor(3.0)}, path, {"alpha": "4"})
        loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
        _, config = loaders.MiniMaxH3LoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
        assert config is None
        layers = LoraModel.load_adapter(model, path).plans["default"].layers
        assert {layer.name.rpartition(".")[2]: layer.alpha for layer in layers} == {"0": 3.0, "2": 2.0}


@pytest.mark.parametrize(
    "names", [["aggregate_embed"], ["audio_aggregate_embed", "video_aggregate_embed"]], ids=["one", "two"]
)
def test_projections_of_ltx_2_are_those_of_its_connectors(names, tmp_path):
    """Which are a part of their own in diffusers, and stand beside the denoiser for its authors."""
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    ltx_2 = pytest.importorskip("diffusers.pipelines.ltx2")
    with torch.device("meta"):
        connectors = ltx_2.LTX2TextConnectors(per_modality_projections=len(names) > 1)
        transformer = pytest.importorskip("diffusers").LTX2VideoTransformer3DModel(num_layers=1)
    keys = ["diffusion_model.patchify_proj", *(f"text_embedding_projection.{name}" for name in names)]
    file = {f"{key}.{factor}.weight": torch.randn(2, 2) for key in keys for factor in ("lora_A", "lora_B")}
    path = tmp_path / "adapter.safetensors"
    save_file(file, path)
    converted = loaders.LTX2LoraLoaderMixin.lora_state_dict(str(path))
    parts = nn.ModuleDict({"transformer": transformer, "connectors": connectors})
    found = DiffusersFormat().load(path, parts, DiffusersFormat.options).layers
    assert {f"{name}.lora_{factor}.weight" for name in found for factor in "AB"} == converted.keys()
    for name, layer in found.items():
        assert torch.equal(layer.B, converted[f"{name}.lora_B.weight"])


def tiny_flux():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def flux_output(model):
    return model(
        hidden_states=torch.randn(1, 6, 4).double(),
        encoder_hidden_states=torch.randn(1, 5, 16).double(),
        pooled_projections=torch.randn(1, 16).double(),
        timestep=torch.tensor([0.3]).double(),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


FLUX = Part("transformer", tiny_flux, flux_output, [])

UNET_NAMES = [
    "input_blocks_2_0_op",
    "input_blocks_3_1_proj_in",
    "middle_block_2_in_layers_2",
    "output_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "output_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
]
FLUX_NAMES = [
    "double_blocks_1_img_attn_qkv",
    "double_blocks_1_txt_attn_qkv",
    "double_blocks_1_img_attn_proj",
    "double_blocks_1_txt_mlp_2",
    "single_blocks_1_linear2",
    "single_blocks_1_modulation_lin",
]
"""But for `linear1`, which diffusers splits in Flux of the published size alone."""


def tensors_for(part, names, *, dora=False):
    """The tensors of an adapter on layers of a part that are given by their original names without dots."""
    torch.manual_seed(3)
    model = part.build()
    places = {name.replace(".", "_"): place.names for name, place in original_places(model).items()}
    tensors = {}
    for name in names:
        layers = [model.get_submodule(each) for each in places[name]]
        weight = layers[0].weight
        rows = sum(len(layer.weight) for layer in layers)
        key = f"lora_unet_{name}"
        tensors |= {
            f"{key}.lora_down.weight": torch.randn(2, *weight.shape[1:]).double(),
            f"{key}.lora_up.weight": torch.randn(rows, 2, *([1] * (weight.dim() - 2))).double(),
            f"{key}.alpha": torch.tensor(3.0),
        }
        if dora:
            tensors[f"{key}.dora_scale"] = 1 + torch.rand(rows, *([1] * (weight.dim() - 1))).double()
    return tensors


@pytest.mark.parametrize(("part", "names"), [(UNET, UNET_NAMES), (FLUX, FLUX_NAMES)], ids=["unet", "flux"])
def test_the_outputs_are_those_of_diffusers(part, names, tmp_path):
    loaders = pytest.importorskip("diffusers").loaders
    tensors = tensors_for(part, names)
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    theirs = part.build()
    if part is UNET:
        mixin = loaders.StableDiffusionXLLoraLoaderMixin
        state_dict, alphas = mixin.lora_state_dict(str(path), unet_config=theirs.config)
        mixin.load_lora_into_unet(state_dict, alphas, unet=theirs)
    else:
        mixin = loaders.FluxLoraLoaderMixin
        state_dict, alphas = mixin.lora_state_dict(str(path), return_alphas=True)
        mixin.load_lora_into_transformer(state_dict, alphas, theirs)
    assert part.difference(part.build(), theirs) > 1e-3
    part.read_exactly(path, theirs)


@thinned(
    2,
    network={"unet": (UNET, UNET_NAMES), "flux": (FLUX, [*FLUX_NAMES, "single_blocks_0_linear1"])},
    spelled={
        "A and B": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
        "down and up": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
        "nothing": ("", "lora_A.weight", "lora_B.weight"),
        "nothing, down and up": ("", "lora_down.weight", "lora_up.weight"),
        "name of the adapter": ("", "lora_A.default.weight", "lora_B.default.weight"),
        "PEFT's": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
        "the part": ("{part}.", "lora_A.weight", "lora_B.weight"),
        "a compiled part": ("{part}._orig_mod.", "lora_A.weight", "lora_B.weight"),
        "parameters": ("", "lora_A", "lora_B"),
    },
)
def test_keys_with_dots_are_those_layers(network, spelled, tmp_path):
    (part, names), (start, down, up) = network, spelled
    """As ComfyUI has them, behind `diffusion_model`, and others behind something else; alone and in its pipeline."""
    tensors = tensors_for(part, names)
    save_file(tensors, tmp_path / "kohya.safetensors")
    dotted = {name.replace(".", "_"): name for name in original_places(part.build())}
    ends = {"lora_down.weight": down, "lora_up.weight": up, "alpha": "alpha"}
    renamed = {}
    for key, tensor in tensors.items():
        name, _, end = key.removeprefix("lora_unet_").partition(".")
        renamed[f"{start.format(part=part.name)}{dotted[name]}.{ends[end]}"] = tensor
    save_file(renamed, tmp_path / "comfy.safetensors")
    theirs, alone, pipeline = part.build(), part.build(), nn.ModuleDict({part.name: part.build()})
    LoraModel.load_adapter(theirs, tmp_path / "kohya.safetensors")
    for model in (alone, pipeline):
        LoraModel.load_adapter(model, tmp_path / "comfy.safetensors")
    assert part.difference(alone, theirs) == part.difference(pipeline[part.name], theirs) == 0


def test_keys_of_xlabs_are_those_layers(tmp_path):
    loaders = pytest.importorskip("diffusers").loaders
    shapes = {
        "double_blocks.1": {
            f"{name}_lora{n}": (rows, 16) for name, rows in {"qkv": 48, "proj": 16}.items() for n in (1, 2)
        },
        "single_blocks.1": {"qkv_lora": (48, 16), "proj_lora": (16, 80)},
    }
    tensors = {
        f"{block}.processor.{name}.{direction}.weight": torch.randn(shape).double()
        for block, layers in shapes.items()
        for name, (rows, columns) in layers.items()
        for direction, shape in {"down": (2, columns), "up": (rows, 2)}.items()
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    model, theirs = FLUX.build(), FLUX.build()
    state_dict = loaders.FluxLoraLoaderMixin.lora_state_dict(str(tmp_path / "adapter.safetensors"))
    loaders.FluxLoraLoaderMixin.load_lora_into_transformer(state_dict, None, theirs)
    with pytest.warns(UserWarning, match="no alpha"):
        LoraModel.load_adapter(model, tmp_path / "adapter.safetensors")
    assert FLUX.difference(model, FLUX.build()) > 1e-3
    assert FLUX.difference(model, theirs) <= TOLERANCE


@pytest.mark.parametrize("key", ["lora_unet_single_blocks_0_linear1", "diffusion_model.single_blocks.0.linear1"])
def test_the_norms_of_dora_are_those_of_the_rows(key, tmp_path):
    tensors = tensors_for(FLUX, ["single_blocks_0_linear1"], dora=True)
    tensors = {key + name.removeprefix("lora_unet_single_blocks_0_linear1"): each for name, each in tensors.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    model, theirs = FLUX.build(), FLUX.build()
    block = theirs.single_transformer_blocks[0]
    layers = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    A, B, alpha, scale = tensors.values()
    moved = torch.cat([layer.weight for layer in layers]) + alpha / 2 * B @ A
    moved = scale * moved / moved.norm(dim=1, keepdim=True)
    for layer, weight in zip(layers, moved.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data.copy_(weight)
    assert FLUX.difference(model, theirs) > 1e-3
    LoraModel.load_adapter(model, tmp_path / "adapter.safetensors")
    assert FLUX.difference(model, theirs) <= TOLERANCE


def t5():
    transformers = pytest.importorskip("transformers")
    return transformers.T5EncoderModel(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    )


def test_a_file_of_flux_goes_into_the_parts_of_its_pipeline(tmp_path):
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = tensors_for(FLUX, ["single_blocks_1_linear1"])
    tensors |= {f"{layer}.lora_down.weight": torch.ones(1, 16), f"{layer}.lora_up.weight": torch.ones(16, 1)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    parts = nn.ModuleDict({"transformer": FLUX.build(), "text_encoder_2": t5()})
    lora = LoraModel.load_adapter(parts, tmp_path / "adapter.safetensors")
    adapted = {layer.name for layer in lora.plans["default"].layers}
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in adapted
    assert "transformer.single_transformer_blocks.1.proj_mlp" in adapted


@pytest.mark.parametrize(
    ("start", "other"),
    [
        ("text_encoders.clip_l.transformer.text_model", "text_encoders.t5xxl.transformer"),
        ("text_encoders.clip_h.transformer", None),
        ("lora_te", None),
        ("lora_te1", "lora_te2"),
    ],
    ids=["ComfyUI", "ComfyUI, of Stable Diffusion 2", "ai-toolkit", "ai-toolkit, of two"],
)
def test_keys_with_dots_have_names_of_text_encoders(start, other, tmp_path):
    names = {f"{start}.encoder.layers.0.self_attn.q_proj": "text_encoder.encoder.layers.0.self_attn.q_proj"}
    if other is not None:
        layer = "encoder.block.0.layer.0.SelfAttention.q"
        names[f"{other}.{layer}"] = f"text_encoder_2.{layer}"
    tensors = {
        f"{name}.{key}.weight": torch.ones(shape)
        for name in names
        for key, shape in {"lora_A": (2, 16), "lora_B": (16, 2)}.items()
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    parts = nn.ModuleDict({"text_encoder": TEXT.build(), "text_encoder_2": t5()})
    layers = LoraModel.load_adapter(parts, tmp_path / "adapter.safetensors").plans["default"].layers
    assert {layer.name for layer in layers} == {*names.values()}


def test_a_t5_is_the_one_text_encoder_of_a_pipeline(tmp_path):
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    shapes = {"lora_A": (2, 16), "lora_B": (16, 2)}
    tensors = {
        f"text_encoders.t5xxl.transformer.{layer}.{key}.weight": torch.ones(shape) for key, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    lora = LoraModel.load_adapter(nn.ModuleDict({"text_encoder": t5()}), tmp_path / "adapter.safetensors")
    assert [each.name for each in lora.plans["default"].layers] == [f"text_encoder.{layer}"]


@pytest.mark.parametrize(
    ("start", "part"),
    [
        ("text_encoders.llama.transformer.", "text_encoder_4"),
        ("text_encoder_4.", "text_encoder_4"),
        ("lora_te4_", "text_encoder_4"),
        ("text_encoders.qwen25_7b.transformer.", "text_encoder"),
        ("text_encoders.gemma2_2b.transformer.", "text_encoder"),
        ("text_encoders.byt5_small.transformer.", "text_encoder_2"),
    ],
    ids=[
        "ComfyUI's Llama of HiDream",
        "diffusers'",
        "kohya's",
        "ComfyUI's Qwen of Qwen-Image",
        "ComfyUI's Gemma of Lumina 2",
        "ComfyUI's ByT5 of HunyuanImage",
    ],
)
def test_a_language_model_is_a_text_encoder_of_a_pipeline(start, part, tmp_path):
    """As OneTrainer writes them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=5
    )
    layer = "model.layers.0.mlp.up_proj"
    key = start + (layer if start.endswith(".") else layer.replace(".", "_"))
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    parts = nn.ModuleDict({part: transformers.LlamaForCausalLM(config)})
    lora = LoraModel.load_adapter(parts, tmp_path / "adapter.safetensors")
    assert [each.name for each in lora.plans["default"].layers] == [f"{part}.{layer}"]


@pytest.mark.parametrize("start", ["text_encoders.qwen3_06b.transformer.model.", "lora_te_model_", "lora_te_"])
@pytest.mark.parametrize("alone", [False, True], ids=["pipeline", "the encoder"])
def test_an_encoder_without_its_head_has_names_of_the_model_around_it(start, alone, tmp_path):
    """Of Anima: sd-scripts trains the encoder itself, and converts it to what ComfyUI has."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=5)
    )
    layer = "layers.0.mlp.up_proj"
    key = start + (layer if start.endswith(".") else layer.replace(".", "_"))
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    parts = nn.ModuleDict({"text_encoder": encoder})
    lora = LoraModel.load_adapter(encoder if alone else parts, tmp_path / "adapter.safetensors")
    assert [each.name for each in lora.plans["default"].layers] == ["text_encoder." * (not alone) + layer]


def encoders_of_hunyuan_video():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return nn.ModuleDict(
        {
            "text_encoder": transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=5)),
            "text_encoder_2": transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, vocab_size=5)),
        }
    )


@pytest.mark.parametrize("adapted", [["llama"], ["clip_l"], ["llama", "clip_l"]], ids=" and ".join)
def test_llama_is_the_first_text_encoder_of_hunyuan_video(adapted, tmp_path):
    """As OneTrainer writes them for ComfyUI."""
    parts = encoders_of_hunyuan_video()
    fc1 = next(name for name, _ in parts.text_encoder_2.named_modules() if name.endswith("fc1"))
    layers = {"llama": "layers.0.mlp.up_proj", "clip_l": fc1}
    expected = {own: f"{part}.{layer}" for part, (own, layer) in zip(parts, layers.items(), strict=True)}
    tensors = {
        f"text_encoders.{own}.transformer.{layers[own]}.{key}.weight": torch.ones(*shape)
        for own in adapted
        for key, shape in {"lora_down": (2, 16), "lora_up": (24, 2)}.items()
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    lora = LoraModel.load_adapter(parts, tmp_path / "adapter.safetensors")
    assert {each.name for each in lora.plans["default"].layers} == {expected[own] for own in adapted}


CLIP_LAYER, LLAMA_LAYER = "text_model.encoder.layers.0.mlp.fc1", "layers.0.mlp.up_proj"


def file_with(names, path):
    """A file with an A and a B of one rank for each name of a layer from 16 to 24 features."""
    ends = {"lora_down.weight": torch.ones(1, 16), "lora_up.weight": torch.ones(24, 1), "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{end}": tensor.clone() for name in names for end, tensor in ends.items()}, path)
    return path


TWICE = {
    "CLIP": (["text_encoder." + CLIP_LAYER, "text_encoder_2." + CLIP_LAYER], "text_encoder_2"),
    "kohya's CLIP": ([f"lora_te{n}_{CLIP_LAYER.replace('.', '_')}" for n in (1, 2)], "text_encoder_2"),
    "Llama": (["text_encoder." + LLAMA_LAYER, "text_encoders.llama.transformer." + LLAMA_LAYER], "text_encoder"),
}


@pytest.mark.parametrize(("names", "part"), TWICE.values(), ids=TWICE)
@pytest.mark.parametrize("said", [False, True], ids=["not said", "said"])
def test_two_parts_of_a_file_are_not_one_of_the_model(names, part, said, tmp_path, untouched):
    path, model = file_with(names, tmp_path / "adapter.safetensors"), encoders_of_hunyuan_video()
    options = {"component": part} if said else {}
    match = rf"has the parts 'text_encoder', 'text_encoder_\d', which are both '{part}' of this model"
    with untouched(model), pytest.raises(AdapterFileError, match=match):
        LoraModel.load_adapter(model, path, format_options=options)


def test_two_parts_of_a_file_that_are_not_read_may_be_one_of_the_model(tmp_path):
    path = file_with([*TWICE["CLIP"][0], "text_encoder_4." + LLAMA_LAYER], tmp_path / "adapter.safetensors")
    options = {"component": "text_encoder"}
    lora = LoraModel.load_adapter(encoders_of_hunyuan_video(), path, format_options=options)
    assert [layer.name for layer in lora.plans["default"].layers] == [f"text_encoder.{LLAMA_LAYER}"]


def test_a_part_that_the_model_names_otherwise_is_offered_by_that_name(tmp_path):
    path = file_with(["text_encoder_4." + LLAMA_LAYER], tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match=r"no part 'text_encoder_4'\. Did you mean 'text_encoder'\?"):
        LoraModel.load_adapter(encoders_of_hunyuan_video(), path, format_options={"component": "text_encoder_4"})


@pytest.mark.parametrize(
    "name",
    [
        "prior.fc",
        "conditional_transformer.fc",
        "diffusion_model.fc",
        "diffusion_model.transformer_2.fc",
        "text_encoders.bert.transformer.fc",
        "text_embedding_projection.fc",
        "lora_te.fc",
    ],
)
def test_what_files_call_parts_may_be_modules_of_the_model_itself(name, tmp_path):
    def tree(names):
        return nn.ModuleDict({names[0]: tree(names[1:])}) if names else nn.Linear(16, 24)

    path = file_with([name, "head"], tmp_path / "adapter.safetensors")
    model = nn.ModuleDict({**tree(name.split(".")), "head": nn.Linear(16, 24)})
    lora = LoraModel.load_adapter(model, path)
    assert {layer.name for layer in lora.plans["default"].layers} == {name, "head"}


def anima():
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.CosmosTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=1)
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=4, target_dim=4, model_dim=4, num_layers=1, num_attention_heads=2, target_vocab_size=5
    )
    return nn.ModuleDict({"transformer": transformer, "text_conditioner": conditioner})


class TestTextConditioner:
    """Of Anima: its authors have it in the denoiser, diffusers beside it."""

    QUERY = "llm_adapter.blocks.0.self_attn.q_proj"
    OTHERS = "blocks.0.self_attn.q_proj"

    @pytest.fixture(params=["diffusion_model.", "lora_unet_"])
    def path(self, request, tmp_path):
        def key(name):
            return request.param + (name if request.param.endswith(".") else name.replace(".", "_"))

        rows = {self.QUERY: 4, self.OTHERS: 24}
        tensors = {f"{key(name)}.lora_down.weight": torch.ones(1, size) for name, size in rows.items()}
        tensors |= {f"{key(name)}.lora_up.weight": torch.ones(size, 1) for name, size in rows.items()}
        tensors |= {f"{key(name)}.alpha": torch.tensor(1.0) for name in rows}
        save_file(tensors, tmp_path / "adapter.safetensors")
        return tmp_path / "adapter.safetensors"

    def adapted(self, model, path, **options):
        lora = LoraModel.load_adapter(model, path, format_options=options)
        return {layer.name for layer in lora.plans["default"].layers}

    def test_both_are_read_into_a_module_of_them(self, path):
        names = {"transformer.transformer_blocks.0.attn1.to_q", "text_conditioner.blocks.0.self_attn.q_proj"}
        assert self.adapted(anima(), path) == names

    def test_one_of_them_is_chosen(self, path):
        parts = anima()
        assert self.adapted(parts["transformer"], path, component="transformer") == {"transformer_blocks.0.attn1.to_q"}
        assert self.adapted(parts["text_conditioner"], path, component="text_conditioner") == {
            "blocks.0.self_attn.q_proj"
        }

    def test_a_model_that_has_it_there_keeps_it(self, path):
        def block(size):
            return nn.ModuleDict({"0": nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(size, size)})})})

        model = nn.ModuleDict({"blocks": block(24), "llm_adapter": nn.ModuleDict({"blocks": block(4)})})
        assert self.adapted(model, path) == {self.QUERY, self.OTHERS}

    def test_it_is_written_as_that_part(self, tmp_path):
        lora = LoraModel(anima()["text_conditioner"], LoraConfig(r=2, target_modules=["q_proj"]))
        file = lora.save_adapter(tmp_path / "adapter.safetensors", format="diffusers")
        assert all(key.startswith("text_conditioner.blocks.0.") for key in load_file(file))


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris", "lora_transformer"])
@pytest.mark.parametrize("name", ["transformer_blocks_0_attn_to_q", "img_in"])
def test_a_denoiser_of_a_pipeline_needs_no_telling_name(prefix, name, tmp_path):
    """`lora_unet` is what scripts write for transformers too."""
    width = 4 if name == "img_in" else 16
    key = f"{prefix}_{name}"
    tensors = {f"{key}.lora_down.weight": torch.randn(1, width), f"{key}.lora_up.weight": torch.randn(16, 1)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    alone, parts = FLUX.build(), nn.ModuleDict({"transformer": FLUX.build(), "text_encoder_2": t5()})
    LoraModel.load_adapter(alone, tmp_path / "adapter.safetensors")
    LoraModel.load_adapter(parts, tmp_path / "adapter.safetensors", format_options={"component": "transformer"})
    assert FLUX.difference(parts["transformer"], FLUX.build()) > 1e-3
    assert FLUX.difference(parts["transformer"], alone) == 0


@pytest.mark.parametrize("options", [{"component": None}, {"component": "transformer"}], ids=["not said", "said"])
def test_without_a_model_such_a_file_is_not_converted(options, tmp_path):
    """Whichever part of a pipeline is said to be written: names would be of no model."""
    tensors = {"lora_A.weight": torch.ones(1, 16), "lora_B.weight": torch.ones(112, 1)}
    save_file(
        {f"diffusion_model.single_blocks.0.linear1.{key}": x for key, x in tensors.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ConfigError, match=r"original implementation .* the base model is needed"):
        convert(tmp_path / "a.safetensors", DIFFUSERS, DIFFUSERS.options, tmp_path / "b", DIFFUSERS, options)
    assert not (tmp_path / "b").exists()


def test_parts_that_names_begin_with_are_not_said_twice(tmp_path):
    tensors = {"lora_A.weight": torch.ones(1, 16), "lora_B.weight": torch.ones(16, 1)}
    save_file({f"unet.mid_block.to_q.{key}": x for key, x in tensors.items()}, tmp_path / "a.safetensors")
    options = {"component": "unet"}
    convert(tmp_path / "a.safetensors", DIFFUSERS, DIFFUSERS.options, tmp_path / "b", DIFFUSERS, options)
    assert [*DIFFUSERS.load(tmp_path / "b", None, DIFFUSERS.options).layers] == ["unet.mid_block.to_q"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "another.safetensors"])
def test_a_file_of_peft_with_its_config_is_peft_s(name, tmp_path):
    """Without it, the alphas are not known, and said to be taken for the ranks."""
    model = FLUX.build()
    LoraModel(model, LoraConfig(r=2, alpha=8, target_modules=["to_q"])).save_adapter(tmp_path, format="peft")
    path = (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    with pytest.warns(UserWarning, match="no alpha") if name != "adapter_model.safetensors" else nullcontext():
        lora = LoraModel.load_adapter(FLUX.build(), path)
    assert lora.adapters["default"].alpha == (8 if name == "adapter_model.safetensors" else 2)


@pytest.mark.parametrize("start", ["diffusion_model.", "transformer."])
@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"], ids=["folder", "file"])
def test_a_config_of_peft_tells_the_alphas_of_original_names_beside_it(name, start, tmp_path):
    """As diffusion-pipe writes them: the config targets names of training, which some keys no longer have."""
    keys = {
        "double_blocks.1.img_attn.qkv": "double_blocks_1_img_attn_qkv",
        "single_blocks.1.linear2": "single_blocks_1_linear2",
    }
    flat = tensors_for(FLUX, keys.values())
    save_file(flat, tmp_path / "expected.safetensors")
    kinds = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors = {
        f"{start}{key}.{own}": flat[f"lora_unet_{bare}.{of_kohya}"]
        for key, bare in keys.items()
        for own, of_kohya in kinds.items()
    }
    folder = tmp_path / "epoch10"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.25,
        "target_modules": ["double_blocks.1.img_attn_qkv"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    expected = FLUX.build()
    LoraModel.load_adapter(expected, tmp_path / "expected.safetensors")
    model = FLUX.build()
    lora = LoraModel.load_adapter(model, folder / name)
    assert FLUX.difference(model, expected) == 0
    assert lora.adapters["default"].dropout == 0.25
    lora.save_adapter(folder, format="diffusers")  # the new file counts, and the config beside it does not
    FLUX.read_exactly(folder, expected)


class TestRefused:
    def refused(self, tensors, tmp_path, untouched, match):
        save_file(tensors, tmp_path / "adapter.safetensors")
        model = FLUX.build()
        with untouched(model), pytest.raises(AdapterFileError, match=match):
            LoraModel.load_adapter(model, tmp_path / "adapter.safetensors")

    def test_other_numbers_of_outputs(self, tmp_path, untouched):
        tensors = tensors_for(FLUX, ["single_blocks_0_linear1"])
        key = "lora_unet_single_blocks_0_linear1.lora_up.weight"
        tensors[key] = tensors[key][:-1].clone()
        self.refused(tensors, tmp_path, untouched, "has 111 outputs, and 'single_transformer_blocks.*have 112 together")

    def test_two_names_of_one_layer(self, tmp_path, untouched):
        tensors = tensors_for(FLUX, ["double_blocks_1_img_attn_qkv"])
        again = "lora_unet_transformer_blocks_1_attn_to_k"
        tensors |= {f"{again}.lora_down.weight": torch.ones(1, 16), f"{again}.lora_up.weight": torch.ones(16, 1)}
        self.refused(tensors, tmp_path, untouched, r"another layer .* are both 'transformer_blocks\.1\.attn\.to_k'")

    def test_two_names_of_the_denoiser(self, tmp_path, untouched):
        names = ["diffusion_model.single_blocks.0.linear2", "transformer.transformer_blocks.0.attn.to_q"]
        tensors = {f"{names[0]}.lora_A.weight": torch.ones(1, 80), f"{names[0]}.lora_B.weight": torch.ones(16, 1)}
        tensors |= {f"{names[1]}.lora_A.weight": torch.ones(1, 16), f"{names[1]}.lora_B.weight": torch.ones(16, 1)}
        self.refused(tensors, tmp_path, untouched, "the denoiser as 'diffusion_model' and as 'transformer'")

    def test_norms_of_the_inputs(self, tmp_path, untouched):
        """Of a square weight, only their shape tells."""
        key = "diffusion_model.transformer_blocks.0.attn.to_q"
        tensors = {f"{key}.lora_down.weight": torch.ones(1, 16), f"{key}.lora_up.weight": torch.ones(16, 1)}
        tensors[f"{key}.dora_scale"] = torch.ones(1, 16)
        self.refused(tensors, tmp_path, untouched, r"dora_scale \(1, 16\), which is not one of its 16 outputs")

    def test_a_layer_that_the_model_does_not_have(self, tmp_path, untouched):
        tensors = tensors_for(FLUX, ["single_blocks_0_linear1"])
        tensors = {key.replace("blocks_0", "blocks_7"): tensor for key, tensor in tensors.items()}
        self.refused(tensors, tmp_path, untouched, "1 of 1 layers .* Did you mean 'single_blocks_[01]_linear1'")
