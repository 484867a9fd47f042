"""The kits: for each kind of plugins, what checks one of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_plugins.plugins import FORMATS, INITS, LAYERS, STORAGES, VARIANTS, PluginKind
from lora_plugins.testing.check import Check
from lora_plugins.testing.formats import FORMAT_CHECKS, check_format_plugin
from lora_plugins.testing.inits import INIT_CHECKS, check_init_plugin
from lora_plugins.testing.layers import LAYER_CHECKS, check_layer_plugin
from lora_plugins.testing.storages import STORAGE_CHECKS, check_storage_plugin
from lora_plugins.testing.variants import VARIANT_CHECKS, check_variant_plugin


@dataclass(frozen=True)
class Kit:
    """What checks the plugins of one kind.

    Args:
        kind: The kind.
        check: Runs the checks on a plugin.
        checks: All checks by name, in the order they are run.
        takes_device: Whether `check` can be told a device; inits draw on the CPU, and files have none.
    """

    kind: PluginKind[Any]
    check: Callable[..., None]
    checks: Mapping[str, Check[Any]]
    takes_device: bool = False

    @property
    def fixture(self) -> str:
        """Name of the pytest fixture that runs each check as a test of its own."""
        return f"{self.kind.name.removesuffix('s')}_check"


KITS: tuple[Kit, ...] = (
    Kit(LAYERS, check_layer_plugin, LAYER_CHECKS, takes_device=True),
    Kit(INITS, check_init_plugin, INIT_CHECKS),
    Kit(VARIANTS, check_variant_plugin, VARIANT_CHECKS, takes_device=True),
    Kit(FORMATS, check_format_plugin, FORMAT_CHECKS),
    Kit(STORAGES, check_storage_plugin, STORAGE_CHECKS, takes_device=True),
)
"""One kit for each kind."""
