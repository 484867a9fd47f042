"""The device that is meant where none is named."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.devices import default_device, usable_device


def test_without_an_accelerator_it_is_the_processor():
    there = torch.accelerator.is_available()
    assert (default_device().type == "cpu") is not there
    assert usable_device(None) == default_device()


def test_a_device_that_is_named_is_taken():
    assert usable_device("meta") == torch.device("meta")
    with pytest.raises(ConfigError, match="--device is 'cuda:77', which torch cannot use here"):
        usable_device("cuda:77", "--device")
