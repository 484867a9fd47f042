"""One adapter over the parts of a pipeline: files, weights, merging, and every bit as before."""

import copy
import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError, TargetError
from lora_plugins.integrations.diffusers import LoraPipeline, Sampling, default_targets, family_of, parts_of
from tests.integrations.diffusers.pipelines import PIPELINES, build, t5
from tests.slow import thinned

SAMPLING = Sampling(steps=2, guidance=3.0, height=16, width=16)
TOLERANCE = 1e-5
"""Of pictures in [0, 1] in float32, which go through a pipeline of some hundred layers."""


def drawn(pipe, seed=0):
    generator = torch.Generator().manual_seed(seed)
    arguments = SAMPLING.arguments(pipe, 1)
    return pipe(["a photo of sks dog"], generator=[generator], output_type="np", **arguments).images


def distance(first, second):
    return float(np.abs(first - second).max())


def config(pipe, words=("attention",), **fields):
    targets = default_targets(family_of(pipe), parts_of(pipe), words, text_encoder=True)
    return LoraConfig(**{"r": 2, "alpha": 5, "target_modules": targets, **fields})


def moved(lora, seed=0):
    """Gives all adapters values that change the pipeline."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return lora


def bits(pipe):
    return {name: tensor.clone() for name, tensor in parts_of(pipe).state_dict().items()}


def same_bits(pipe, before):
    now = parts_of(pipe).state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@thinned(2, name=[*PIPELINES], format=["lora_plugins", "diffusers", "kohya"])
def test_an_adapter_over_all_parts_comes_back_in_every_format(name, format, tmp_path):
    pipe = build(name)
    before, base = bits(pipe), drawn(pipe)
    lora = moved(LoraPipeline(pipe, config(pipe)))
    expected = drawn(pipe)
    assert distance(expected, base) > 1e-3
    path = lora.save_adapter(tmp_path / "file.safetensors" if format != "lora_plugins" else tmp_path, format=format)
    lora.unload()
    assert same_bits(pipe, before)
    assert distance(drawn(pipe), base) == 0
    LoraPipeline.load_adapter(pipe, path)
    assert distance(drawn(pipe), expected) <= TOLERANCE


@thinned(
    2,
    name=["Stable Diffusion", "Stable Diffusion XL", "Stable Diffusion 3", "Flux"],
    text_encoder={"with text encoders": True, "denoiser alone": False},
)
def test_diffusers_draws_the_same_pictures_from_its_file(name, text_encoder, tmp_path):
    pipe, theirs = build(name), build(name)
    targets = default_targets(family_of(pipe), parts_of(pipe), text_encoder=text_encoder)
    lora = moved(LoraPipeline(pipe, config(pipe, target_modules=targets)))
    assert distance(drawn(pipe), drawn(theirs)) > 1e-3
    theirs.load_lora_weights(lora.save_adapter(tmp_path / "file.safetensors", format="diffusers"))
    assert distance(drawn(pipe), drawn(theirs)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("Stable Diffusion", {"lora_unet", "lora_te"}),
        ("Stable Diffusion XL", {"lora_unet", "lora_te1", "lora_te2"}),
        ("Flux", {"lora_transformer", "lora_te1"}),
    ],
)
def test_diffusers_draws_the_same_pictures_from_a_file_for_the_webui(name, prefixes, tmp_path):
    pipe, theirs = build(name), build(name)
    lora = moved(LoraPipeline(pipe, config(pipe)))
    path = lora.save_adapter(tmp_path / "file.safetensors", format="kohya")
    assert {"_".join(key.split("_")[:2]) for key in load_file(path)} == prefixes
    assert all("_text_model_encoder_layers_" in key for key in load_file(path) if key.startswith("lora_te"))
    theirs.load_lora_weights(path)
    assert distance(drawn(pipe), drawn(theirs)) <= TOLERANCE


def test_convolutions_too_in_diffusers_file(tmp_path):
    pipe, theirs = build("Stable Diffusion"), build("Stable Diffusion")
    words = ("attention", "feed_forward", "convolutions")
    lora = moved(LoraPipeline(pipe, config(pipe, words)))
    theirs.load_lora_weights(lora.save_adapter(tmp_path / "file.safetensors", format="diffusers"))
    assert distance(drawn(pipe), drawn(theirs)) <= TOLERANCE


def chroma():
    """A pipeline whose only text encoder is a T5, except for what it draws with."""
    return diffusers.ChromaPipeline(
        scheduler=None,
        vae=None,
        tokenizer=None,
        text_encoder=t5().eval(),
        transformer=diffusers.ChromaTransformer2DModel(num_layers=0, num_single_layers=0, attention_head_dim=16),
    )


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # which diffusers' Chroma uses
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    ("make", "part", "layers"),
    [
        (lambda: build("Stable Diffusion"), "text_encoder", "q_proj"),
        (lambda: build("Stable Diffusion"), "text_encoder", "mlp.fc1"),
        (lambda: build("Stable Diffusion XL"), "text_encoder_2", "text_projection"),
        pytest.param(chroma, "text_encoder", "SelfAttention.q", marks=pytest.mark.slow),
    ],
    ids=["CLIP's attention", "CLIP without attention", "CLIP's projection", "T5"],
)
def test_diffusers_computes_the_same_with_layers_of_text_encoders(make, part, layers, variant, tmp_path):
    def encoded(pipe):
        with torch.no_grad():
            return pipe.components[part](torch.arange(1, 6)[None])[0].numpy()

    pipe = make()
    theirs = copy.deepcopy(pipe)
    plain = encoded(pipe)
    lora = moved(LoraPipeline(pipe, LoraConfig(r=2, alpha=5, target_modules=[layers], variant=variant)))
    path = lora.save_adapter(tmp_path / "file.safetensors", format="diffusers")
    expected = encoded(pipe)
    theirs.load_lora_weights(path)
    assert distance(encoded(theirs), expected) <= TOLERANCE < distance(expected, plain)
    lora.unload()
    LoraPipeline.load_adapter(pipe, path)
    assert distance(encoded(pipe), expected) == 0


def test_a_config_without_layers_has_those_of_the_family():
    pipe = build("Stable Diffusion")
    plan = LoraPipeline.plan(pipe, LoraConfig(r=2))
    assert {layer.name.rpartition("attn")[2][2:] for layer in plan.layers} == {"to_q", "to_k", "to_v", "to_out.0"}
    lora = LoraPipeline(pipe, LoraConfig(r=2))
    assert lora.plans["default"].layers == plan.layers
    lora.add_adapter("other", LoraConfig(r=2))
    assert lora.plans["other"].layers == plan.layers


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Stable Diffusion", "StableDiffusionInpaintPipeline"),
        ("Stable Diffusion XL", "StableDiffusionXLImg2ImgPipeline"),
        ("Stable Diffusion 3", "StableDiffusion3Img2ImgPipeline"),
        ("Flux", "FluxImg2ImgPipeline"),
        ("PixArt", "PixArtSigmaPipeline"),
    ],
)
def test_a_pipeline_with_the_denoiser_of_a_family_has_its_layers(name, kind):
    pipe = build(name)
    expected = LoraPipeline.plan(pipe, LoraConfig(r=2))
    takes = inspect.signature(getattr(diffusers, kind)).parameters
    other = getattr(diffusers, kind)(**{part: value for part, value in pipe.components.items() if part in takes})
    assert LoraPipeline.plan(other, LoraConfig(r=2)).layers == expected.layers


def test_several_are_tried_with_weights_and_reset():
    """What users of a WebUI do."""
    pipe = build("Stable Diffusion")
    before, base = bits(pipe), drawn(pipe)
    lora = LoraPipeline(pipe, config(pipe), "style")
    lora.add_adapter("subject", config(pipe, r=3))
    moved(lora)
    pictures = {}
    for names, weights in {("style",): [1.0], ("subject",): [0.5], ("style", "subject"): [0.7, 0.3]}.items():
        lora.set_adapter(names, weights=weights)
        pictures[names] = drawn(pipe)
        lora.merge_adapter()
        assert distance(drawn(pipe), pictures[names]) <= TOLERANCE
        lora.unmerge_adapter()
        assert distance(drawn(pipe), pictures[names]) == 0
    with lora.disable_adapter():
        assert distance(drawn(pipe), base) == 0
    lora.delete_adapter("style")
    lora.unload()
    assert same_bits(pipe, before)
    assert distance(drawn(pipe), base) == 0


@pytest.mark.filterwarnings("ignore:Pipelines loaded with `dtype=torch.float16`:UserWarning")
@pytest.mark.parametrize("name", ["Stable Diffusion", "Stable Diffusion 3"])
def test_five_rounds_of_merging_in_half_precision_change_no_bit(name):
    pipe = build(name)
    for part in parts_of(pipe).values():
        part.half()
    before = bits(pipe)
    lora = moved(LoraPipeline(pipe, config(pipe)))
    for _ in range(5):
        lora.merge_adapter()
        assert not same_bits(pipe, before)
        lora.unmerge_adapter()
    lora.unload()
    assert same_bits(pipe, before)


def test_a_second_handle_sees_the_same_adapters():
    pipe = build("Stable Diffusion")
    LoraPipeline(pipe, config(pipe), "style")
    assert list(LoraPipeline(pipe).adapters) == ["style"]
    LoraPipeline(pipe).unload()
    with pytest.raises(StateError, match=r"no adapter.*LoraPipeline\.load_adapter"):
        LoraPipeline(pipe)


def test_a_handle_that_is_called_names_the_pipeline():
    pipe = build("Stable Diffusion")
    lora = LoraPipeline(pipe, config(pipe))
    with pytest.raises(TypeError, match=r"LoraPipeline is a handle .* call the pipeline itself: pipe\(\.\.\.\)"):
        lora("a photo")
    with pytest.raises(AttributeError, match="LoraPipeline has no attribute 'scheduler'"):
        _ = lora.scheduler


def test_merged_for_good_it_is_a_pipeline_like_any_other(tmp_path):
    pipe = build("Stable Diffusion")
    lora = moved(LoraPipeline(pipe, config(pipe)))
    expected = drawn(pipe)
    lora.merge_and_unload()
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert distance(drawn(loaded), expected) <= TOLERANCE


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(tmp_path):
    pipe, other = build("Stable Diffusion"), build("Stable Diffusion")
    path = moved(LoraPipeline(pipe, config(pipe))).save_adapter(tmp_path)
    with torch.no_grad():
        for parameter in parts_of(other).parameters():
            parameter.mul_(1.5)
    before = bits(other)
    with pytest.raises(AdapterFileError, match="base"):
        LoraPipeline.load_adapter(other, path)
    assert same_bits(other, before)


def test_an_adapter_of_another_family_is_refused(tmp_path):
    pipe = build("Stable Diffusion")
    path = moved(LoraPipeline(pipe, config(pipe))).save_adapter(tmp_path / "file.safetensors", format="diffusers")
    with pytest.raises(AdapterFileError, match="unet"):
        LoraPipeline.load_adapter(build("Flux"), path)


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(TargetError, match="to_qq"):
        LoraPipeline(build("Stable Diffusion"), LoraConfig(r=2, target_modules=["to_qq"]))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object()], ids=["a module", "an object"])
def test_what_is_no_pipeline_is_named(thing):
    with pytest.raises(ConfigError, match="no pipeline of diffusers"):
        LoraPipeline(thing, LoraConfig(r=2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda pipe: LoraPipeline(pipe, {"r": 2}), r"LoraPipeline: config is a dict.*Write LoraConfig\(\*\*values\)"),
        (lambda pipe: LoraPipeline.plan(pipe, LoraConfig), r"LoraPipeline\.plan: config is the class LoraConfig"),
        (lambda pipe: LoraPipeline(pipe, peft_config=LoraConfig()), "no argument 'peft_config'. It is 'config' here"),
        (lambda pipe: LoraPipeline.load_adapter("folder", pipe), r"Write LoraPipeline\.load_adapter\(pipe, path\)"),
    ],
    ids=["a dict", "a class", "a word of PEFT", "swapped"],
)
def test_arguments_of_another_kind_are_told(call, said):
    with pytest.raises(ConfigError, match=said):
        call(build("Stable Diffusion"))


def test_a_part_with_adapters_of_its_own_is_refused():
    pipe = build("Stable Diffusion")
    LoraModel(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(StateError, match="unet of the StableDiffusionPipeline has adapters of its own"):
        LoraPipeline(pipe, LoraConfig(r=2))
    LoraModel(pipe.unet).unload()
    LoraPipeline(pipe, LoraConfig(r=2))


def test_adapters_of_another_pipeline_with_the_same_parts_are_told():
    pipe = build("Stable Diffusion")
    LoraPipeline(pipe, config(pipe))
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
    with pytest.raises(StateError, match=r"'unet', 'text_encoder' of this StableDiffusionImg2ImgPipeline .*from_pipe"):
        LoraPipeline(other)
    LoraPipeline(pipe).unload()
    LoraPipeline(other, LoraConfig(r=2)).unload()


def test_a_part_that_is_replaced_under_adapters_is_refused():
    pipe = build("Stable Diffusion")
    LoraPipeline(pipe, LoraConfig(r=2))
    own, pipe.text_encoder = pipe.text_encoder, build("Stable Diffusion").text_encoder
    with pytest.raises(StateError, match=r"was replaced or taken out while it had adapters.*Put it back"):
        LoraPipeline(pipe)
    pipe.text_encoder = None
    with pytest.raises(StateError, match=r"had unet, text_encoder, and has unet\."):
        LoraPipeline(pipe)
    pipe.text_encoder = own
    LoraPipeline(pipe).unload()


def test_a_compiled_part_has_the_names_and_adapters_of_what_it_compiles():
    pipe = build("Stable Diffusion")
    part, lora = pipe.unet, LoraPipeline(pipe, config(pipe))
    pipe.unet = torch.compile(part, backend="eager")
    assert parts_of(pipe)["unet"] is part
    assert LoraPipeline(pipe).adapters == lora.adapters
    LoraPipeline(pipe).unload()
    assert not any("lora_" in name for name in part.state_dict())


@pytest.mark.slow  # by torch, which traces a whole denoiser each time
@pytest.mark.parametrize("format", ["lora_plugins", "diffusers", "kohya"])
def test_a_compiled_part_is_the_part_that_it_compiles(format, tmp_path):
    pipe, other = build("Stable Diffusion"), build("Stable Diffusion")
    lora = moved(LoraPipeline(pipe, config(pipe)))
    expected = drawn(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert distance(drawn(pipe), expected) <= TOLERANCE
    assert LoraPipeline(pipe).adapters == lora.adapters
    path = lora.save_adapter(tmp_path / "file.safetensors" if format != "lora_plugins" else tmp_path, format=format)
    other.unet = torch.compile(other.unet, backend="eager")
    base = drawn(other)
    LoraPipeline.load_adapter(other, path)
    assert distance(drawn(other), expected) <= TOLERANCE
    LoraPipeline(other).unload()
    assert distance(drawn(other), base) == 0


@pytest.mark.parametrize("name", ["Stable Diffusion", "Stable Diffusion 3", "Flux"])
def test_projections_are_fused_when_adapters_are_merged(name):
    pipe = build(name)
    denoiser = parts_of(pipe)[family_of(pipe).denoiser]
    moved(LoraPipeline(pipe, config(pipe))).merge_and_unload()
    expected = drawn(pipe)
    denoiser.fuse_qkv_projections()
    assert distance(drawn(pipe), expected) <= TOLERANCE


parts_or_one = pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "part"])


@pytest.mark.parametrize("name", ["Stable Diffusion", pytest.param("Flux", marks=pytest.mark.slow)])
class TestFusedProjections:
    """`fuse_qkv_projections` computes with copies of the weights, which were made when it was called."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda lora: lora.set_adapter("default", weights=[0.5]),
            lambda lora: lora.add_adapter("other", LoraConfig(r=2, target_modules=["to_out.0"])),
            lambda lora: lora.delete_adapter("default"),
            lambda lora: lora.disable_adapter(),
            lambda lora: lora.mixed_batch(["default"]),
            lambda lora: lora.merge_adapter(),
            lambda lora: lora.unload(),
        ],
        ids=["set", "add", "delete", "disable", "mixed_batch", "merge", "unload"],
    )
    def test_a_change_of_adapters_is_refused_until_they_are_unfused(self, name, call):
        pipe = build(name)
        base = drawn(pipe)
        lora = moved(LoraPipeline(pipe, config(pipe)))
        expected = drawn(pipe)
        denoiser = getattr(pipe, family_of(pipe).denoiser)
        denoiser.fuse_qkv_projections()
        with pytest.raises(
            StateError, match=r"attn.*fused copies of their projections.*unfuse_qkv_projections\(\) first"
        ):
            call(lora)
        assert distance(drawn(pipe), expected) <= TOLERANCE
        denoiser.unfuse_qkv_projections()
        assert distance(drawn(pipe), expected) == 0
        lora.unload()
        assert distance(drawn(pipe), base) == 0

    @parts_or_one
    def test_an_adapter_on_them_is_refused(self, name, whole):
        pipe = build(name)
        getattr(pipe, family_of(pipe).denoiser).fuse_qkv_projections()
        before = bits(pipe)
        model, kind = (pipe, LoraPipeline) if whole else (getattr(pipe, family_of(pipe).denoiser), LoraModel)
        with pytest.raises(StateError, match="fused copies of their projections"):
            kind(model, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        assert same_bits(pipe, before)

    @parts_or_one
    def test_one_on_other_layers_is_not(self, name, whole):
        pipe = build(name)
        denoiser = getattr(pipe, family_of(pipe).denoiser)
        denoiser.fuse_qkv_projections()
        base = drawn(pipe)
        model, kind = (pipe, LoraPipeline) if whole else (denoiser, LoraModel)
        lora = moved(kind(model, LoraConfig(r=2, target_modules=["to_out.0"])))
        expected = drawn(pipe)
        assert distance(expected, base) > 1e-4
        lora.merge_adapter()
        assert distance(drawn(pipe), expected) <= TOLERANCE
        lora.unload()
        assert distance(drawn(pipe), base) == 0


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("first", ["adapter", "casting"])
def test_weights_stored_in_few_bits_leave_adapters_their_precision(storage, first):
    """`enable_layerwise_casting` casts each layer before and after its call."""
    pipe, base = build("Stable Diffusion"), build("Stable Diffusion")
    for each in [base] if first == "adapter" else [base, pipe]:
        each.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    lora = moved(LoraPipeline(pipe, config(pipe)))
    before = {name: value.clone() for name, value in pipe.unet.named_parameters() if "lora_" in name}
    if first == "adapter":
        pipe.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert distance(drawn(pipe), drawn(base)) > 1e-3
    after = dict(pipe.unet.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    lora.unload()
    assert distance(drawn(pipe), drawn(base)) == 0


def test_layers_are_called_after_unloading_under_group_offloading():
    pipe = build("Stable Diffusion")
    base = drawn(pipe)
    lora = moved(LoraPipeline(pipe, config(pipe)))
    expected, cpu = drawn(pipe), torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert distance(drawn(pipe), expected) == 0
    lora.unload()
    assert distance(drawn(pipe), base) == 0


IN_GROUPS = [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]


@pytest.mark.parametrize("by", IN_GROUPS, ids=["leaves", "blocks"])
def test_what_group_offloading_takes_from_copies_is_not_changed(by, tmp_path, device):
    """Each forward reads files, or memory that is pinned; what is in the place of the tensors meanwhile is nothing."""
    pipe = build("Stable Diffusion")
    lora = moved(LoraPipeline(pipe, config(pipe)))
    lora.save_adapter(tmp_path / "adapter")
    expected = drawn(pipe)
    near = 0 if device.type == "cpu" else TOLERANCE
    copies = {"offload_to_disk_path": str(tmp_path / "parts")} if device.type == "cpu" else {"use_stream": True}
    pipe.unet.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **copies, **by)
    for part in (pipe.text_encoder, pipe.vae):
        part.to(device)
    assert distance(drawn(pipe), expected) <= near
    calls = (
        lora.merge_adapter,
        lora.merge_and_unload,
        lambda: lora.swap_adapter("default", tmp_path / "adapter"),
        lambda: lora.add_adapter("other", config(pipe)),
    )
    for call in calls:
        with pytest.raises(StateError, match=r"not possible while group offloading of diffusers takes .* 'unet"):
            call()
    if device.type == "cpu":
        with pytest.raises(StateError, match=r"group offloading of diffusers has those of 'unet.* on the disk"):
            lora.save_adapter(tmp_path / "again")
        assert not (tmp_path / "again").exists()
    assert distance(drawn(pipe), expected) <= near


def test_a_changed_base_is_not_exchanged_while_group_offloading_takes_it_from_copies(tmp_path):
    pipe = build("Stable Diffusion")
    lora = moved(LoraPipeline(pipe, config(pipe, init="pissa")))
    expected, cpu = drawn(pipe), torch.device("cpu")
    pipe.unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_to_disk_path=str(tmp_path), offload_type="leaf_level"
    )
    for call in (lora.unload, lambda: lora.delete_adapter("default"), lambda: lora.disable_adapter().__enter__()):
        with pytest.raises(StateError, match=r"Giving 'unet.* the value of another adapter, or of the base, is not"):
            call()
    assert distance(drawn(pipe), expected) == 0


def test_offloading_each_layer_changes_nothing(tmp_path):
    """As `enable_sequential_cpu_offload` does it, which wants a GPU to compute on."""
    accelerate = pytest.importorskip("accelerate")
    pipe = build("Stable Diffusion")
    lora = moved(LoraPipeline(pipe, config(pipe)))
    expected = drawn(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=True)
    assert distance(drawn(pipe), expected) == 0
    with pytest.raises(StateError, match="meta device"):
        lora.save_adapter(tmp_path / "adapter.safetensors")
    pipe.remove_all_hooks()
    lora.save_adapter(tmp_path / "adapter.safetensors")
    assert distance(drawn(pipe), expected) == 0


def test_adapters_by_rows_with_guidance():
    """The denoiser has rows for the negative prompts before those for the prompts."""
    pipe = build("Stable Diffusion")
    lora = moved(LoraPipeline(pipe, LoraConfig(r=2, alpha=5), "a"))
    lora.add_adapter("b", replace(lora.adapters["a"], r=3))
    moved(lora, seed=1)
    expected = []
    for name in ("a", "b"):
        lora.set_adapter(name)
        expected.append(drawn(pipe)[0])
    with lora.mixed_batch(["a", "b", "a", "b"]):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        arguments = SAMPLING.arguments(pipe, 2)
        pictures = pipe(["a photo of sks dog"] * 2, generator=generators, output_type="np", **arguments).images
    assert distance(pictures, np.stack(expected)) <= TOLERANCE


def wan():
    """A pipeline of Wan 2.2, except for what it draws with: two transformers, of which each has a part of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformers = [
            diffusers.WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
            ).eval()
            for _ in range(2)
        ]
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=None,
        transformer=transformers[0],
        transformer_2=transformers[1],
    )


def denoised(pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        given = torch.randn(1, 4, 1, 4, 4), torch.tensor([3.0]), torch.randn(1, 5, 16)
    with torch.no_grad():
        return [part(*given).sample.numpy() for part in (pipe.transformer, pipe.transformer_2)]


def test_layers_of_other_families_have_to_be_named():
    pipe = wan()
    with pytest.raises(ConfigError, match=r"layers of a WanPipeline are worth adapting\. Name them.*'to_q'"):
        LoraPipeline(pipe, LoraConfig(r=2))
    lora = LoraPipeline(pipe, LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert len(lora.plans["default"].layers) == 16


FILES = {"diffusers": "transformer.", "kohya": "lora_transformer_", "comfyui": "diffusion_model."}


@pytest.mark.filterwarnings("ignore:.*which others do not know in this format:UserWarning")
class TestTwoTransformers:
    """As Wan 2.2 has them. diffusers reads a file of each, with the name of the first in front of its keys."""

    def adapted(self, parts=("transformer", "transformer_2")):
        pipe = wan()
        names = [f"{part}.blocks.0.attn1.to_{projection}" for part in parts for projection in "qv"]
        return pipe, moved(LoraPipeline(pipe, LoraConfig(r=2, alpha=5, target_modules=names)))

    def files(self, lora, folder, format):
        return {
            part: lora.save_adapter(folder / f"{part}.safetensors", format=format, format_options={"component": part})
            for part in ("transformer", "transformer_2")
        }

    @pytest.mark.parametrize("format", FILES)
    def test_each_has_a_file_and_comes_back(self, format, tmp_path):
        pipe, lora = self.adapted()
        expected = denoised(pipe)
        lora_files = self.files(lora, tmp_path, format)
        for path in lora_files.values():
            keys = load_file(path)
            assert all(key.startswith(f"{FILES[format]}blocks") for key in keys)
            assert len({key.partition(".lora")[0].removesuffix(".alpha") for key in keys}) == 2
        lora.unload()
        for part, path in lora_files.items():
            lora = LoraPipeline.load_adapter(pipe, path, part, format_options={"component": part})
        lora.set_adapter([*lora_files])
        assert all(map(np.array_equal, denoised(pipe), expected))

    def test_diffusers_reads_each(self, tmp_path):
        pipe, lora = self.adapted()
        theirs = wan()
        for part, path in self.files(lora, tmp_path, "diffusers").items():
            theirs.load_lora_weights(path, load_into_transformer_2=part == "transformer_2")
        for ours, other, base in zip(denoised(pipe), denoised(theirs), denoised(wan()), strict=True):
            assert distance(ours, base) > 1e-3
            assert distance(ours, other) <= TOLERANCE

    @pytest.mark.parametrize("format", FILES)
    def test_both_in_one_file_are_refused(self, format, tmp_path):
        """diffusers would leave out the second without a word."""
        _, lora = self.adapted()
        with pytest.raises(ConfigError, match=r"save each of them by itself.*'component': 'transformer_2'"):
            lora.save_adapter(tmp_path / "both.safetensors", format=format)
        assert not (tmp_path / "both.safetensors").exists()

    @pytest.mark.parametrize("format", FILES)
    def test_a_part_without_layers_is_refused(self, format, tmp_path):
        _, lora = self.adapted(["transformer"])
        with pytest.raises(ConfigError, match=r"no layers in 'transformer_2'\. Did you mean 'transformer'"):
            lora.save_adapter(tmp_path / "a.safetensors", format=format, format_options={"component": "transformer_2"})

    def test_the_second_alone(self, tmp_path):
        pipe = wan()
        pipe.transformer = None
        lora = moved(LoraPipeline(pipe, LoraConfig(r=2, target_modules=["to_q"])))
        assert {layer.name.partition(".")[0] for layer in lora.plans["default"].layers} == {"transformer_2"}
        weights = [layer.weight.clone() for layer in lora.model.modules() if "lora_A" in dir(layer)]
        path = lora.save_adapter(tmp_path / "a.safetensors", format="diffusers")
        lora.unload()
        LoraPipeline.load_adapter(pipe, path)
        again = [layer.weight for layer in lora.model.modules() if "lora_A" in dir(layer)]
        assert len(weights) == 2
        assert all(map(torch.equal, weights, again))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_one_part_of_a_pipeline_is_written_by_itself(format, tmp_path):
    pipe = build("Stable Diffusion")
    before = drawn(pipe)
    lora = moved(LoraPipeline(pipe, config(pipe)))
    path = tmp_path / "file.safetensors"
    lora.save_adapter(path, format=format, format_options={"component": "text_encoder"})
    lora.unload()
    again = LoraPipeline.load_adapter(pipe, path)
    assert {layer.name.partition(".")[0] for layer in again.plans["default"].layers} == {"text_encoder"}
    assert distance(drawn(pipe), before) > 1e-4


@pytest.mark.parametrize(("name", "part"), [("Flux", "text_encoder_2"), ("Stable Diffusion 3", "text_encoder_3")])
def test_parts_that_diffusers_leaves_out_are_told(name, part, tmp_path):
    pipe, theirs = build(name), build(name)
    lora = moved(LoraPipeline(pipe, LoraConfig(r=2, target_modules=r".*\.(to_[qv]|SelfAttention\.[qv])")))
    with pytest.warns(UserWarning, match=rf"reads layers of 'transformer', .* silently leaves out those of '{part}'"):
        path = lora.save_adapter(tmp_path / "both.safetensors", format="diffusers")
    options = {"component": "transformer"}
    alone = lora.save_adapter(tmp_path / "alone.safetensors", format="diffusers", format_options=options)
    theirs.load_lora_weights(path)
    drawn_by_diffusers = drawn(theirs)
    theirs.unload_lora_weights()
    theirs.load_lora_weights(alone)
    assert distance(drawn(theirs), drawn_by_diffusers) == 0
    assert distance(drawn(pipe), drawn_by_diffusers) > 1e-4


def test_a_copy_has_adapters_of_its_own():
    pipe = build("Stable Diffusion")
    moved(LoraPipeline(pipe, config(pipe)))
    copied = copy.deepcopy(pipe)
    expected = drawn(pipe)
    assert distance(drawn(copied), expected) == 0
    LoraPipeline(copied).unload()
    assert distance(drawn(pipe), expected) == 0
