"""What is said of errors that a run ends with."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.integrations.lightning.cli.explained import explained_run


def test_too_little_memory_of_a_cpu_is_one_message_with_what_to_take():
    with pytest.raises(ConfigError, match=r"memory of the device is too small.*--batch-size"), explained_run():
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="must match"), explained_run():
        torch.zeros(2) + torch.zeros(3)
