"""The conformance kit on the layer type and the init: one test for each check."""

import pytest
import torch
from lora_plugins_example.inits import OrthonormalInit
from lora_plugins_example.layers import BilinearPlugin
from torch import nn

from lora_plugins import ConfigError


def test_layer(layer_check):
    layer_check(
        BilinearPlugin(),
        lambda **options: nn.Bilinear(3, 4, 5, **options),
        lambda layer: (torch.randn(6, 3), torch.randn(6, 4)),
        options=[{}, {"bias": False}],
    )


def test_init(init_check):
    init_check(OrthonormalInit(), options=[{}, {"gain": 2.0}])


def test_gain_of_zero():
    with pytest.raises(ConfigError, match="gain of orthonormal is 0"):
        OrthonormalInit().check_options({"gain": 0})
