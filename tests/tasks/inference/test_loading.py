"""Tasks come back from the files of a fit."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lora_plugins import ConfigError, LoraError, LoraModel
from lora_plugins.cli.main import main
from lora_plugins.tasks import (
    DigitsDataModule,
    ImageClassificationTask,
    ModelConfig,
    SemanticSegmentationTask,
    WeightsError,
    load_base,
    load_task,
)
from lora_plugins.tasks.models import CLASSIFIERS, build_network
from tests.core.file_cases import manifest_of, write_manifest

from ..conftest import HALF, noise, tiny_vit, write_image
from .conftest import FILES, fit, fit_task


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_the_task_comes_back_with_its_classes(fitted, kind, file):
    task, files = fitted[kind]
    again = load_task(files[file])
    assert type(again) is type(task)
    assert again.class_names == task.class_names
    images = torch.rand(2, 3, 16, 16) if kind == "labels" else torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(again(images), task(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "size"), [("labels", 16), ("masks", 64)])
def test_the_base_of_an_adapter_serves_its_conversion(fitted, kind, size, tmp_path):
    folder = str(fitted[kind][1]["adapter"])
    model = ["--model", "lora_plugins.tasks:load_base", folder]
    assert main(["convert", folder, str(tmp_path / "for_peft"), "--to", "peft", *model]) == 0
    network = load_base(folder)
    LoraModel.load_adapter(network, tmp_path / "for_peft")
    again, images = load_task(folder).network, torch.rand(2, 3, size, size)
    torch.testing.assert_close(network(images), again(images), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["checkpoint", "adapter"])
def test_a_base_that_was_moved(fitted, tmp_path, capsys, file):
    task, files = fitted["labels"]
    base, now = Path(task.model_config.weights), tmp_path / "now.safetensors"
    write_image(tmp_path / "it.png", noise(16, 16))
    base.rename(now)
    try:
        assert main(["predict", str(files[file]), str(tmp_path)]) == 1
        assert (
            f"The weights of the base are no more in {base}. Say where they are: --weights" in capsys.readouterr().err
        )
        again = load_task(files[file], now)
        given = ["predict", str(files[file]), str(tmp_path / "it.png"), "--weights", str(now)]
        assert main([*given, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
        load_task(files["merged"])
        load_task(files["merged checkpoint"])
    finally:
        now.rename(base)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), task(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("file", ["merged", "merged checkpoint"])
def test_weights_for_a_file_that_has_all_are_refused(fitted, file):
    with pytest.raises(ConfigError, match=r"weights \(--weights\) is other\.pth, which would not be read"):
        load_task(fitted["labels"][1][file], "other.pth")


@pytest.mark.parametrize("file", ["checkpoint", "adapter"])
def test_a_base_that_another_folder_has(tmp_path, monkeypatch, file):
    """The fit ran there, and named it without a folder."""
    (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(there)
    save_file(build_network(tiny_vit(), CLASSIFIERS).module.state_dict(), "base.safetensors")
    task = ImageClassificationTask(tiny_vit(weights="base.safetensors"))
    files = fit_task(task, DigitsDataModule([0, 1, 2]), there, "head")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"no more in base\.safetensors\. Say where they are: --weights"):
        load_task(files[file])
    assert load_task(files[file], there / "base.safetensors").class_names == ["0", "1", "2"]


@pytest.mark.parametrize("file", ["checkpoint", "adapter"])
@pytest.mark.parametrize("now", ["changed", "gone"])
def test_a_network_is_given_images_as_in_the_fit(tmp_path, now, file):
    """What the folder of a base says of its images may change, and what a library says, with its version."""
    folder, said = tmp_path / "base", tmp_path / "base" / "preprocessor_config.json"
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**small, image_size=16, patch_size=8, num_labels=3)).save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], do_flip_channel_order=True
    )
    processor.save_pretrained(folder)
    task = ImageClassificationTask(ModelConfig("transformers", str(folder), 3, "pretrained"))
    assert task.bgr
    files, images = fit_task(task, DigitsDataModule([0, 1, 2]), tmp_path, "classifier"), torch.rand(2, 3, 16, 16)
    expected, content = task.eval()(images), said.read_text()
    said.unlink()
    if now == "changed":
        said.write_text(content.replace("0.4", "0.1").replace('order": true', 'order": false'))
    torch.testing.assert_close(load_task(files[file])(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_a_merged_checkpoint_of_a_stored_base(tmp_path, kind):
    task, files = fit(kind, tmp_path, quantize="nf4", quantize_options={"min_size": 0})
    adapted = load_task(files["checkpoint"])
    assert any(tensor.dtype == torch.uint8 for tensor in adapted.state_dict().values())
    (tmp_path / "base.safetensors").unlink()
    again = load_task(files["merged checkpoint"])
    assert not any(tensor.dtype == torch.uint8 for tensor in again.state_dict().values())
    assert (again.class_names, again.image_size) == (task.class_names, adapted.image_size)
    images = torch.rand(2, 3, 64, 64) if kind == "masks" else torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), adapted(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("file", ["merged", "merged checkpoint"])
def test_an_adapter_that_is_trained_on_a_merged_file_is_of_it(fitted, file):
    task, files = fitted["labels"]
    again = load_task(files[file])
    assert again.provenance()["arguments"]["model"]["weights"] == str(files[file])
    built = ImageClassificationTask(again.model_config).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(built(images), task(images), atol=1e-5, rtol=1e-4)


def test_a_whole_file_says_how_its_images_are_normalized(tmp_path):
    """smp asks the hub for the normalization of encoders of its own, with their pretrained weights."""
    model = ModelConfig("smp", "Unet", 2, "none", {"encoder_name": "resnet18"}, HALF, HALF)
    task = SemanticSegmentationTask(model).eval()
    task.hparams["model"].update(mean=None, std=None, weights="pretrained")
    checkpoint = {"state_dict": task.state_dict(), "task": task.provenance(), "hyper_parameters": dict(task.hparams)}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0"}, tmp_path / "it.ckpt")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_task(tmp_path / "it.ckpt")(images), task(images))


class Small(ImageClassificationTask):
    """Sets its model itself, has an argument of its own, and a part that is built late."""

    def __init__(self, lr=0.5, sides=(1, 1)):
        super().__init__(tiny_vit(), lr=lr)
        self.save_hyperparameters("sides")

    def configure_model(self):
        self.late = nn.Linear(*self.hparams.sides)


@pytest.mark.parametrize("has_hyperparameters", [True, False])
def test_a_checkpoint_of_a_class_of_a_user(tmp_path, has_hyperparameters):
    task = Small(lr=0.1, sides=(2, 3)).eval()
    task.configure_model()
    checkpoint = {"state_dict": task.state_dict(), "task": task.provenance()}
    if has_hyperparameters:
        checkpoint["hyper_parameters"] = dict(task.hparams)
    torch.save(checkpoint, tmp_path / "it.ckpt")
    again, images = load_task(tmp_path / "it.ckpt"), torch.rand(1, 3, 16, 16)
    assert (type(again), again.lr) == (Small, 0.1)
    assert torch.equal(again.late.weight, task.late.weight)
    assert again.hparams.sides == ((2, 3) if has_hyperparameters else [2, 3])
    assert torch.equal(again(images), task(images))


def test_a_base_that_was_random(fitted, tmp_path):
    task, files = fitted["labels"]
    folder = tmp_path / "adapter"
    shutil.copytree(files["adapter"], folder)
    manifest = manifest_of(folder)
    manifest["task"]["arguments"]["model"]["weights"] = "none"
    write_manifest(folder, manifest)
    with pytest.raises(WeightsError, match=r"was random \(weights: none\) and is in no file.*export_to"):
        load_task(folder)
    images = torch.rand(2, 3, 16, 16)
    again = load_task(folder, files["adapter"].parent / "base.safetensors")  # which was saved by hand
    torch.testing.assert_close(again(images), task(images), atol=1e-5, rtol=1e-4)


EDITED = {
    "no arguments": ("arguments", None),
    "a number for them": ("arguments", 3),
    "no model": ("arguments.model", None),
    "a list for a model": ("arguments.model", []),
    "a model without a name": ("arguments.model.name", None),
    "a source that is none": ("arguments.model.source", 3),
    "classes in words": ("arguments.model.num_classes", "three"),
    "a loss that is none": ("arguments.loss", 3),
    "class names that are none": ("arguments.class_names", 3),
    "an argument of the next version": ("arguments.new", 3),
    "a size in words": ("image_size", ["16", 16]),
    "an interpolation that is none": ("interpolation", ["bilinear"]),
    "a target that is not there": ("target", "backbone"),
    "a target that is none": ("target", 3),
}


def edit(content, place, value):
    """Sets an entry by the path of its keys; None takes it out."""
    *path, last = place.split(".")
    for key in path:
        content = content[key]
    content.pop(last, None)
    if value is not None:
        content[last] = value


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "merged"])
@pytest.mark.parametrize("place", EDITED)
def test_words_of_a_file_that_cannot_be_built(fitted, tmp_path, place, kind):
    source, path = fitted["labels"][1][kind], tmp_path / fitted["labels"][1][kind].name
    if kind == "adapter":
        shutil.copytree(source, path)
        content = manifest_of(path)
        edit(content["task"], *EDITED[place])
        write_manifest(path, content)
    elif kind == "checkpoint":
        content = torch.load(source, weights_only=True)
        edit(content["task"], *EDITED[place])
        torch.save(content, path)
    else:
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
        provenance = json.loads(metadata["lora_plugins.task"])
        edit(provenance, *EDITED[place])
        save_file(load_file(source), path, {**metadata, "lora_plugins.task": json.dumps(provenance)})
    # A file that holds all weights needs less of what is said.
    with pytest.raises(LoraError) if kind == "adapter" else contextlib.suppress(LoraError):
        load_task(path)


def test_load_from_checkpoint_takes_an_adapter_alone(fitted):
    task, files = fitted["labels"]
    stored = torch.load(files["checkpoint"], weights_only=True)
    assert not any(key.endswith("qkv.weight") for key in stored["state_dict"])
    again = ImageClassificationTask.load_from_checkpoint(files["checkpoint"], weights_only=True).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), task(images), atol=1e-5, rtol=1e-4)


def test_an_adapter_of_a_task_that_draws_pictures(fitted, tmp_path, capsys):
    shutil.copytree(fitted["labels"][1]["adapter"], tmp_path / "adapter")
    said = {"class": "lora_plugins.tasks.diffusion.text_to_image.TextToImageTask", "arguments": {}, "target": "parts"}
    write_manifest(tmp_path / "adapter", manifest_of(tmp_path / "adapter") | {"task": said})
    write_image(tmp_path / "it.png", noise(16, 16))
    assert main(["predict", str(tmp_path / "adapter"), str(tmp_path)]) == 1
    assert (
        "TextToImageTask, which predicts no labels and no masks. If it is a TextToImageTask, draw"
        in capsys.readouterr().err
    )


def test_a_file_that_does_not_say_what_it_is_of(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="does not say which task"):
        load_task(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="There is no"):
        load_task(tmp_path / "nothing.ckpt")
