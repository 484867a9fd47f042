"""A device that torch cannot use here is refused at the start, and no plugin is blamed for it."""

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError
from lora_plugins.layers.linear import LinearPlugin
from lora_plugins.storages.nf4 import NF4Storage
from lora_plugins.testing import check_layer_plugin, check_storage_plugin, check_variant_plugin
from lora_plugins.variants.dora import DoraVariant
from tests.core.processes import run_python
from tests.slow import slow_but

NOWHERE = ["cuda:99", "cpuu", ""]
"""Devices that no machine of ours has."""

CHECKS = {
    "layer": lambda **fields: check_layer_plugin(
        LinearPlugin(), lambda: nn.Linear(4, 3), lambda layer: torch.randn(2, 4), **fields
    ),
    "variant": lambda **fields: check_variant_plugin(DoraVariant(), **fields),
    "storage": lambda **fields: check_storage_plugin(NF4Storage(), **fields),
}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("device", NOWHERE)
def test_a_check_refuses_it(kind, device):
    with pytest.raises(ConfigError, match=f"device is {device!r}, which torch cannot use here: .*take cpu"):
        CHECKS[kind](device=device, only=["registration"])


@pytest.mark.parametrize("device", slow_but(["cuda:99", "cpuu", "", "meta"], ["cuda:99"]))
def test_our_own_tests_refuse_it(device):
    done = run_python("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", __file__, "--device", device)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith(f"ERROR: --device is {device!r}, which torch cannot use here: ")
    assert len(done.stderr.strip().splitlines()) == 1
