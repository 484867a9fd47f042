"""Images of which nothing is left before the last layers."""

import pytest
import timm
import torch
from torch import nn

from lora_plugins import ConfigError
from lora_plugins.tasks.models import refusing_small_images

NETWORKS = {
    "convolutions": lambda: timm.create_model("resnet10t"),
    "pools": lambda: nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)) for _ in range(3))),
    "patches": lambda: timm.create_model("test_vit", dynamic_img_size=True),
}
ENOUGH = {"convolutions": 32, "pools": 8, "patches": 32}


def seen(kind, side):
    network = NETWORKS[kind]().eval()
    with refusing_small_images(network, kind, (160, 160)), torch.no_grad():
        network(torch.rand(2, 3, side, side))
    return network


@pytest.mark.parametrize("kind", NETWORKS)
def test_images_that_are_large_enough(kind):
    assert not any(module._forward_hooks for module in seen(kind, ENOUGH[kind]).modules())


@pytest.mark.parametrize(("kind", "side"), [("convolutions", 8), ("convolutions", 16), ("patches", 16)])
def test_images_that_are_too_small(kind, side):
    with pytest.raises(ConfigError, match=rf"too small for {kind}: .* at [\w.]+\. .*160x160.*--image-size"):
        seen(kind, side)
