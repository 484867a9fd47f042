"""Which pipelines are served, and which of their layers are adapted by default."""

import sys

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.integrations.diffusers import (
    FAMILIES,
    LAYERS,
    LoraPipeline,
    Sampling,
    default_targets,
    family_of,
    load_pipeline,
    parts_of,
    sample,
)
from tests.integrations.diffusers.pipelines import PIPELINES, build
from tests.slow import slow_but

every = pytest.mark.parametrize("name", PIPELINES)
ADAPTED = {  # kinds of layers: how many of them in the tiny pipelines, text encoders included
    "Stable Diffusion": {"attention": 40, "feed_forward": 16, "convolutions": 33},
    "Stable Diffusion 2": {"attention": 40, "feed_forward": 16, "convolutions": 33},
    "Stable Diffusion XL": {"attention": 44, "feed_forward": 20, "convolutions": 37},
    "Stable Diffusion 3": {"attention": 30, "feed_forward": 20, "convolutions": 17},
    "Flux": {"attention": 19, "feed_forward": 11},
    "PixArt": {"attention": 24, "feed_forward": 12, "convolutions": 9},
}


def planned(pipe, *layers, text_encoder=True):
    targets = default_targets(family_of(pipe), parts_of(pipe), layers, text_encoder=text_encoder)
    return LoraPipeline.plan(pipe, LoraConfig(r=2, target_modules=targets)).layers


@every
def test_a_pipeline_is_loaded_from_its_folder(name, tmp_path):
    pipe = build(name)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    sampling = Sampling(steps=2, guidance=3.0, height=16, width=16)
    first, second = (sample(each, ["a photo of sks dog"], [0], sampling)[0] for each in (pipe, loaded))
    assert first.size == (16, 16)
    assert first.tobytes() == second.tobytes()


def test_a_folder_has_no_revisions(tmp_path):
    build("Stable Diffusion").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"revision is 'old', and {tmp_path} is a folder, of which there is one"):
        load_pipeline(tmp_path, revision="old")


@every
def test_default_layers(name):
    pipe = build(name)
    counts = {word: len(planned(pipe, word)) for word in family_of(pipe).layers}
    assert counts == ADAPTED[name]
    words = [word for word in LAYERS if word in counts]
    denoiser = family_of(pipe).denoiser
    alone = planned(pipe, *words, text_encoder=False)
    assert {layer.name.partition(".")[0] for layer in alone} == {denoiser}
    kinds = {"attention": nn.Linear, "feed_forward": nn.Linear, "convolutions": nn.Conv2d}
    for word in words:
        parts = parts_of(pipe)
        layers = [parts.get_submodule(layer.name) for layer in planned(pipe, word, text_encoder=False)]
        assert all(isinstance(layer, kinds[word]) for layer in layers)


@pytest.mark.parametrize("name", slow_but(PIPELINES, ["PixArt", "Flux"]))
def test_what_is_not_used_is_not_adapted(name):
    """Every layer that is adapted by default changes a picture."""
    pipe = build(name)
    sampling = Sampling(steps=2, guidance=1.0, height=16, width=16)
    words = tuple(family_of(pipe).layers)
    for layer in planned(pipe, *words):
        module = parts_of(pipe).get_submodule(layer.name)
        before = _latents(pipe, sampling)
        with torch.no_grad():
            module.weight.add_(0.5)
            after = _latents(pipe, sampling)
            module.weight.add_(-0.5)
        assert not torch.equal(before, after), layer.name


def _latents(pipe, sampling):
    generator = torch.Generator().manual_seed(0)
    arguments = {**sampling.arguments(pipe, 1), "num_inference_steps": 1, "output_type": "latent"}
    return pipe(["a photo of sks dog"], generator=[generator], **arguments).images


def test_a_word_that_is_unknown_or_has_no_layers_is_named():
    flux = build("Flux")
    with pytest.raises(ConfigError, match="Flux has no layers of the kind 'convolutions'"):
        default_targets(FAMILIES["Flux"], parts_of(flux), ["convolutions"])
    with pytest.raises(ConfigError, match=r"'atention'.*attention"):
        default_targets(FAMILIES["Flux"], parts_of(flux), ["atention"])
    with pytest.raises(ConfigError, match="No kind of layers"):
        default_targets(FAMILIES["Flux"], parts_of(flux), [])


def test_a_pipeline_that_is_not_served_is_named_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(ConfigError, match="KandinskyPipeline are not served"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "some/deep/folder", "./folder", "/such"])
def test_a_folder_that_does_not_exist_is_named(path):
    with pytest.raises(ConfigError, match="There is no folder"):
        load_pipeline(path)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # which diffusers still gives
def test_what_can_be_a_name_on_the_hub_is_asked_for_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="The pipeline 'owner/name' cannot be loaded"):
        load_pipeline("owner/name")


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        load_pipeline(tmp_path)


def test_a_damaged_pipeline_is_named(tmp_path):
    build("Stable Diffusion").save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pipeline(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pipeline(tmp_path)


def test_without_diffusers_it_is_said_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"Pipelines need diffusers. Run: pip install 'lora-plugins\[diffusion\]'"):
        load_pipeline(tmp_path)
