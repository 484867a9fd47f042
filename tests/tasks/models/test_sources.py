"""Networks of every source: they answer, declare their head, and refuse wrong names."""

import pytest
import torch
from transformers import ViTConfig

from lora_plugins import ConfigError
from lora_plugins.tasks import ImageClassificationTask, ModelConfig, SemanticSegmentationTask, WeightsError

from ..conftest import HALF, tiny_segformer, tiny_vit, unet

TINY_HF_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def hf_vit(weights="none"):
    return ModelConfig("transformers", "vit", 3, weights, TINY_HF_VIT, HALF, HALF)


CLASSIFICATION = {"timm-vit": (tiny_vit(), "head"), "transformers-vit": (hf_vit(), "classifier")}


SEGMENTATION = {
    "segformer": (tiny_segformer(3), ("decode_head",)),
    "smp-unet": (unet(), ("decoder", "segmentation_head")),
}


@pytest.mark.parametrize(("config", "head"), CLASSIFICATION.values(), ids=CLASSIFICATION)
def test_classifiers_answer_with_one_logit_a_class(config, head):
    task = ImageClassificationTask(config)
    assert task(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    assert task.head_modules == (f"network.{head}",)
    assert task.network.training


@pytest.mark.parametrize(("config", "heads"), SEGMENTATION.values(), ids=SEGMENTATION)
def test_segmenters_answer_at_the_size_of_the_image(config, heads):
    task = SemanticSegmentationTask(config)
    assert task(torch.rand(2, 3, 32, 48)).shape == (2, 3, 32, 48)
    assert task.head_modules == tuple(f"network.{head}" for head in heads)
    assert task.network.training


@pytest.mark.parametrize("task_class", [ImageClassificationTask, SemanticSegmentationTask])
def test_head_modules_are_modules_of_the_task(task_class):
    task = task_class(hf_vit() if task_class is ImageClassificationTask else tiny_segformer())
    assert set(task.head_modules) <= {name for name, _ in task.named_modules()}


ERRORS = {
    "source": (lambda: ModelConfig("tim", "resnet18", 3, "none"), r"'tim'. Did you mean 'timm'"),
    "timm name": (lambda: ModelConfig("timm", "resnet5o", 3, "none"), "Did you mean 'resnet50'"),
    "timm option": (lambda: tiny_vit(bogus=1), "bogus"),
    "model type": (lambda: ModelConfig("transformers", "vitt", 3, "none"), "Did you mean 'vit"),
    "model type of another task": (lambda: ModelConfig("transformers", "dpt", 3, "none"), "'dpt'. Did you mean"),
    "type without weights": (lambda: hf_vit(weights="pretrained"), "no weights of its own"),
    "weights": (lambda: tiny_vit(weights="pretraind"), "Did you mean 'pretrained'"),
    "packaged": (lambda: tiny_vit(weights="package:digit_classifier"), "Did you mean 'digits_classifier'"),
    "normalization": (lambda: ModelConfig("transformers", "vit", 3, "none", TINY_HF_VIT), "set `mean` and `std`"),
}


@pytest.mark.parametrize(("config", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_names_of_classifiers(config, message):
    with pytest.raises((ConfigError, WeightsError), match=message):
        ImageClassificationTask(config())


SEGMENTATION_ERRORS = {
    "decoder": (lambda: unet(decoder="UNet"), "Did you mean 'Unet'"),
    "timm encoder": (lambda: unet(encoder_name="tu-resnet5o"), "Did you mean 'resnet50'"),
    "own encoder": (lambda: unet(encoder_name="resnet19"), "Did you mean 'resnet18'"),
    "no encoder": (lambda: ModelConfig("smp", "Unet", 3, "none"), "needs an encoder"),
    "option": (lambda: unet(encoder_name="resnet18", decoder_chanels=[8]), "Did you mean 'decoder_channels'"),
    "option of a timm encoder": (lambda: unet(bogus=1), "bogus"),
    "option of segformer": (lambda: tiny_segformer(hiddensizes=[8]), "Did you mean 'hidden_sizes'"),
    "option of torchvision": (
        lambda: ModelConfig("torchvision", "lraspp_mobilenet_v3_large", 3, "none", {"weights_backbon": "DEFAULT"}),
        "Unknown option of torchvision's lraspp_mobilenet_v3_large: 'weights_backbon'. Did you mean 'weights_backbone'",
    ),
}


@pytest.mark.parametrize(("config", "message"), SEGMENTATION_ERRORS.values(), ids=SEGMENTATION_ERRORS)
def test_wrong_names_of_segmenters(config, message):
    with pytest.raises(ConfigError, match=message):
        SemanticSegmentationTask(config())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"hidden_dropout_probb": 0.5}, "'hidden_dropout_probb'. Did you mean 'hidden_dropout_prob'"),
        ({"revision": "old"}, "'revision'"),
    ],
    ids=["misspelt", "of what reads"],
)
def test_wrong_options_of_a_folder_of_transformers(option, message, tmp_path):
    ViTConfig(**TINY_HF_VIT).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"Unknown option of transformers' {tmp_path}: {message}"):
        ImageClassificationTask(ModelConfig("transformers", str(tmp_path), 3, "none", option, HALF, HALF))


@pytest.mark.parametrize(
    "values",
    [{"num_classes": 0}, {"mean": HALF}, {"mean": HALF, "std": (0.5,)}, {"mean": HALF, "std": (0.5, 0.5, 0.0)}],
    ids=["no class", "mean alone", "lengths", "zero std"],
)
def test_numbers_that_do_not_go_together(values):
    with pytest.raises(ConfigError):
        ModelConfig(**({"source": "timm", "name": "resnet18", "num_classes": 2, "weights": "none"} | values))
