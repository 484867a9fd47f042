"""The layers that are adapted if a configuration names none."""

from functools import partial

import pytest
import torch

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import ImageClassificationTask
from lora_plugins.tasks.models import SEGMENTERS, build_network, default_targets

from ..conftest import tiny_vit
from .architectures import TRANSFORMERS, config


@pytest.mark.parametrize("name", [name for name, row in TRANSFORMERS.items() if row[2]])
def test_default_targets_are_the_dense_layers(name):
    network = build_network(config(name), SEGMENTERS)
    assert default_targets(network.module, network.new_modules) == TRANSFORMERS[name][2]


CLASSIFIERS = {
    "vit_tiny_patch16_224": ["proj", "qkv", "fc1", "fc2"],
    "swinv2_cr_tiny_224": ["proj", "qkv", "mlp.fc1", "mlp.fc2", "reduction"],  # and not those of position biases
    "convnext_atto": ["stem.0", "fc1", "fc2", "downsample.1"],
    "resnet18": ["conv1", "conv2", "downsample.0"],
    "efficientnet_lite0": ["conv_stem", "conv_pw", "conv_pwl", "conv_head"],
}


@pytest.mark.parametrize(("name", "targets"), CLASSIFIERS.items(), ids=CLASSIFIERS)
def test_default_targets_of_classifiers(name, targets):
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    heads = [network.pretrained_cfg["classifier"]]
    assert default_targets(network, heads) == targets


def test_targets_of_a_configuration_come_first(trainer):
    task = ImageClassificationTask(tiny_vit())
    callback = LoraCallback(LoraConfig(r=2, target_modules=["fc1"]), target="network")
    assert {layer.name.rpartition(".")[2] for layer in callback.plan(task).layers} == {"fc1"}
    callback = LoraCallback(LoraConfig(r=2), target="network")
    assert {layer.name.rpartition(".")[2] for layer in callback.plan(task).layers} == {"proj", "qkv", "fc1", "fc2"}


def test_names_that_are_the_ends_of_others_are_targeted_in_full():
    """`proj` alone would match the layer of positions too."""
    linear = partial(torch.nn.Linear, 2, 2)
    positions = torch.nn.ModuleDict({"proj": linear()})
    network = torch.nn.ModuleDict({"proj": linear(), "fc": linear(), "pos": positions})
    plan = LoraModel.plan(network, LoraConfig(r=1, target_modules=default_targets(network, [])))
    assert [layer.name for layer in plan.layers] == ["proj", "fc"]
