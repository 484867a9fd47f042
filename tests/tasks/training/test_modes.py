"""Modules in eval mode inside a block."""

from torch import nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.tasks.training.modes import eval_mode


def test_norms_that_an_adapter_freezes_have_their_own_mode_after_it():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval())
    lora = LoraModel(network, LoraConfig(r=2))
    with eval_mode(network):
        assert not any(part.training for part in network.modules())
    lora.unload()
    assert [part.training for part in network] == [True, True, False]
