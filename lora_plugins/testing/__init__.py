"""The conformance kit: proves that a layer type, init, variant, format or storage does what the framework relies on.

    from lora_plugins.testing import check_format_plugin, check_init_plugin, check_layer_plugin, check_storage_plugin
    from lora_plugins.testing import check_variant_plugin

    check_layer_plugin(MyLayerPlugin(), MyLayer, lambda layer: torch.randn(2, 8), options=[{}, {"bias": False}])
    check_init_plugin(MyInit(), options=[{}, {"gain": 2.0}])
    check_variant_plugin(MyVariant())
    check_format_plugin(MyFormat(), "adapter.safetensors")
    check_storage_plugin(MyStorage())

In pytest, the fixtures `layer_check`, `init_check`, `variant_check`, `format_check` and `storage_check` run each check
as a test of its own, with the same arguments.
"""

from lora_plugins.testing.check import CheckError
from lora_plugins.testing.formats import FORMAT_CHECKS, check_format_plugin
from lora_plugins.testing.inits import INIT_CHECKS, check_init_plugin
from lora_plugins.testing.kits import KITS, Kit
from lora_plugins.testing.layers import LAYER_CHECKS, check_layer_plugin
from lora_plugins.testing.storages import STORAGE_CHECKS, check_storage_plugin
from lora_plugins.testing.variants import VARIANT_CHECKS, check_variant_plugin

__all__ = [
    "FORMAT_CHECKS",
    "INIT_CHECKS",
    "KITS",
    "LAYER_CHECKS",
    "STORAGE_CHECKS",
    "VARIANT_CHECKS",
    "CheckError",
    "Kit",
    "check_format_plugin",
    "check_init_plugin",
    "check_layer_plugin",
    "check_storage_plugin",
    "check_variant_plugin",
]
