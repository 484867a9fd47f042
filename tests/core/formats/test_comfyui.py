"""Files with original names, written: against the converters of diffusers, which read such names."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel
from lora_plugins.files import format_of
from lora_plugins.formats import PortableAdapter, PortableLayer, convert
from lora_plugins.formats.comfyui import ComfyFormat
from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.original_names import original_places
from tests.core.formats.peft_cases import moved
from tests.core.formats.pipeline_cases import DIT, TEXT, UNET
from tests.core.formats.test_original_names import (
    ADAPTER_CONVERTERS,
    CONVERTERS,
    FLUX,
    Checkpoint,
    flux,
    sdxl,
    weights_of,
)
from tests.slow import slow_but, thinned

COMFYUI = ComfyFormat()
EXACT = 1e-14
"""Of single sums in float64."""

AUTHORS_NAMES = {
    "img_attn.": "img_attn_",
    "txt_attn.": "txt_attn_",
    "self_attn.": "self_attn_",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "_mod.lin": "_mod.linear",
    "modulation.lin": "modulation.linear",
    "c_embedder.in_layer": "c_embedder.linear_1",
    "c_embedder.out_layer": "c_embedder.linear_2",
    "t_embedder.in_layer": "t_embedder.mlp.0",
    "t_embedder.out_layer": "t_embedder.mlp.2",
    "time_in.in_layer": "time_in.mlp.0",
    "time_in.out_layer": "time_in.mlp.2",
    "guidance_in.in_layer": "guidance_in.mlp.0",
    "guidance_in.out_layer": "guidance_in.mlp.2",
}
"""By what ComfyUI calls layers of HunyuanVideo, their names in its checkpoints."""


def of_authors(name):
    for own, original in AUTHORS_NAMES.items():
        name = name.replace(own, original)
    return name


def random_adapter(outputs, *, alpha=None):
    """Of layers with one input, each with its own A, and by default its own alpha."""
    torch.manual_seed(0)
    return PortableAdapter(
        {
            name: PortableLayer(
                torch.randn(2, 1).double(), torch.randn(rows, 2).double(), alpha or 1 + float(torch.rand(1))
            )
            for name, rows in outputs.items()
        }
    )


def update(layer):
    return layer.alpha / layer.r * layer.B @ layer.A


def updates_in(file):
    """The updates of weights in a file, by the names of layers."""
    names = [key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")]
    assert {f"{name}.{end}" for name in names for end in ("lora_A.weight", "lora_B.weight", "alpha")} == file.keys()
    return {
        name.removeprefix("diffusion_model."): update(
            PortableLayer(file[f"{name}.lora_A.weight"], file[f"{name}.lora_B.weight"], float(file[f"{name}.alpha"]))
        )
        for name in names
    }


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed. is deprecated:FutureWarning")  # by diffusers' own Chroma
@pytest.mark.parametrize(
    "build", slow_but(CONVERTERS, CONVERTERS.keys() - {flux, sdxl}), ids=lambda each: each.__name__
)
def test_the_converter_of_checkpoints_takes_every_update(build, tmp_path):
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    with torch.device("meta"):
        model = build()
    adapter = random_adapter(weights_of(model))
    path = COMFYUI.save(tmp_path / "adapter.safetensors", adapter, model, COMFYUI.options)
    start = "model.diffusion_model." if "unet" in CONVERTERS[build] else ""
    rename = of_authors if "hunyuan" in CONVERTERS[build] else str
    names = [f"{start}{name}.{kind}" for name in original_places(model) for kind in ("weight", "bias") if start]
    checkpoint = Checkpoint({name: torch.zeros(1) for name in names})
    checkpoint |= {f"{start}{rename(name)}.weight": each for name, each in updates_in(load_file(path)).items()}
    converted = getattr(utilities, CONVERTERS[build])(checkpoint, config=model.config)
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(converted[f"{name}.weight"], update(layer), rtol=EXACT, atol=EXACT, msg=name)


@pytest.mark.parametrize("build", ADAPTER_CONVERTERS, ids=lambda build: build.__name__)
def test_the_converter_of_adapters_takes_every_update(build, tmp_path):
    """Of those with an alpha that is the rank, which it need not know."""
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    with torch.device("meta"):
        model = build()
    named = {name for place in original_places(model).values() for name in place.names}
    adapter = random_adapter({name: rows for name, rows in weights_of(model).items() if name in named}, alpha=2)
    path = COMFYUI.save(tmp_path / "adapter.safetensors", adapter, model, COMFYUI.options)
    file = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    converted = getattr(loaders, ADAPTER_CONVERTERS[build]).lora_state_dict(file)
    assert {f"transformer.{name}.lora_{key}.weight" for name in adapter.layers for key in "AB"} == converted.keys()
    for name, layer in adapter.layers.items():
        A, B = (converted[f"transformer.{name}.lora_{key}.weight"] for key in "AB")
        torch.testing.assert_close(B @ A, update(layer), rtol=EXACT, atol=EXACT, msg=name)


CONFIGS = {
    "plain": {"alpha": 3},
    "ranks and alphas of layers": {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_k": 3}},
    "some of the joined layers": {"target_modules": ["to_q", "to_v"]},
}


@thinned(2, part={"unet": UNET, "sd3": DIT, "flux": FLUX}, fields=CONFIGS)
def test_what_is_written_computes_the_same_when_read(part, fields, tmp_path):
    model = part.build()
    lora = LoraModel(model, LoraConfig(r=2, **{"target_modules": "all", **fields}))
    moved(model)
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="comfyui")
    assert all(key.startswith("diffusion_model.") for key in load_file(path))
    assert format_of(path).name == "comfyui"
    assert part.difference(part.build(), model) > 1e-3
    part.read_exactly(path, model)


def test_layers_with_one_a_keep_their_rank(tmp_path):
    """As those that were read from a file of one layer have it: the file is the same again."""
    model = FLUX.build()
    lora = LoraModel(model, LoraConfig(r=2, alpha=3, target_modules=["to_q", "to_k", "to_v"]))
    moved(model)
    written = lora.save_adapter(tmp_path / "written.safetensors", format="comfyui")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(written).items() if "single_blocks.0" in key}
    assert shapes == {
        "diffusion_model.single_blocks.0.linear1.lora_A.weight": (6, 16),
        "diffusion_model.single_blocks.0.linear1.lora_B.weight": (112, 6),
        "diffusion_model.single_blocks.0.linear1.alpha": (),
    }
    again = LoraModel.load_adapter(FLUX.build(), written).save_adapter(tmp_path / "2.safetensors", format="comfyui")
    assert again.read_bytes() == written.read_bytes()


def test_b_is_rounded_only_where_scalings_differ(tmp_path):
    factors = {"A": torch.ones(2, 16).bfloat16(), "B": torch.randn(16, 2).bfloat16()}
    alphas = {"0.attn.to_q": 2.0, "0.attn.to_k": 3.0, "1.attn.to_q": 2.0, "1.attn.to_k": 2.0}
    layers = {f"transformer_blocks.{name}": PortableLayer(**factors, alpha=alpha) for name, alpha in alphas.items()}
    path = COMFYUI.save(tmp_path / "a.safetensors", PortableAdapter(layers), FLUX.build(), COMFYUI.options)
    found = {
        block: load_file(path)[f"diffusion_model.double_blocks.{block}.img_attn.qkv.lora_B.weight"] for block in "01"
    }
    assert {block: tensor.dtype for block, tensor in found.items()} == {"0": torch.float32, "1": torch.bfloat16}
    B = factors["B"].float()
    assert torch.equal(found["0"], torch.cat([B, 1.5 * B, torch.zeros(16, 2)]))
    assert torch.equal(found["1"].float(), torch.cat([B, B, torch.zeros(16, 2)]))


def test_the_second_transformer_of_a_pipeline_has_a_file_of_its_own(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 8, "text_dim": 8}
    parts = nn.ModuleDict({name: diffusers.WanTransformer3DModel(**sizes) for name in ("transformer", "transformer_2")})
    lora = LoraModel(parts, LoraConfig(r=2, target_modules=["attn1.to_q"]))
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(ConfigError, match="save each of them by itself"):
        lora.save_adapter(path, format="comfyui")
    options = {"component": "transformer_2"}
    lora.save_adapter(path, format="comfyui", format_options=options)
    assert {key.partition(".lora_")[0] for key in load_file(path) if ".lora_" in key} == {
        "diffusion_model.blocks.0.self_attn.q"
    }
    own = lora.model.transformer_2.blocks[0].attn1.to_q.lora_A["default"]
    assert torch.equal(load_file(path)["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], own)


def test_a_model_that_is_not_of_diffusers_has_its_own_names(tmp_path):
    model = nn.ModuleDict({"double_blocks": nn.ModuleList([nn.Linear(3, 4)])})
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    options = {"component": "transformer"}
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="comfyui", format_options=options)
    assert {*load_file(path)} == {
        f"diffusion_model.double_blocks.0.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")
    }


class TestRefused:
    def refused(self, model, fields, match, tmp_path, error=AdapterFileError):
        lora = LoraModel(model, LoraConfig(r=2, **fields))
        with pytest.raises(error, match=match):
            lora.save_adapter(tmp_path / "adapter.safetensors", format="comfyui")
        assert not [*tmp_path.iterdir()]

    def test_dora(self, tmp_path):
        """ComfyUI divides its norms by those of the base, and not of the changed weight."""
        fields = {"target_modules": ["single_transformer_blocks.1.proj_out"], "variant": "dora"}
        self.refused(FLUX.build(), fields, r"'single_transformer_blocks\.1\.proj_out': of DoRA ComfyUI", tmp_path)

    def test_a_model_without_a_table(self, tmp_path):
        sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_num_groups": 2}
        model = pytest.importorskip("diffusers").DiTTransformer2DModel(**sizes)
        match = "layers of DiTTransformer2DModel are not known. Write format='diffusers'"
        self.refused(model, {"target_modules": ["to_q"]}, match, tmp_path)

    def test_a_layer_that_the_authors_do_not_have(self, tmp_path):
        """Mochi has 48 blocks, of which the last one's layer is called otherwise in diffusers."""
        sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "pooled_projection_dim": 8}
        with torch.device("meta"):
            model = pytest.importorskip("diffusers").MochiTransformer3DModel(**sizes)
        name = "transformer_blocks.0.norm1_context.linear_1"
        with pytest.raises(AdapterFileError, match=rf"'{name}' of Mochi\w+ has no original name"):
            COMFYUI.save(tmp_path / "a.safetensors", random_adapter({name: 4}), model, COMFYUI.options)

    def test_another_part_of_a_pipeline(self, tmp_path):
        self.refused(
            TEXT.build(), {"target_modules": ["q_proj"]}, "'text_encoder' has no form .* of denoisers", tmp_path
        )

    def test_a_folder(self, tmp_path):
        lora = LoraModel(FLUX.build(), LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(AdapterFileError, match=r"is a file, whose name ends in \.safetensors"):
            lora.save_adapter(tmp_path / "folder", format="comfyui")

    def test_without_a_model(self, tmp_path):
        lora = LoraModel(FLUX.build(), LoraConfig(r=2, target_modules=["to_q"]))
        source, target = lora.save_adapter(tmp_path / "source", format="diffusers"), tmp_path / "target.safetensors"
        theirs = DiffusersFormat()
        with pytest.raises(ConfigError, match=r"base model tells the original names .* --model"):
            convert(source, theirs, theirs.options, target, COMFYUI, COMFYUI.options)
        assert not target.exists()
