"""The built-in storages of weights, registered through the same door as anyone else's.

They are plain torch operations, and run on any device.
"""

from lora_plugins.plugins import StorageRegistrar, hookimpl
from lora_plugins.storages.int8 import Int8Storage
from lora_plugins.storages.nf4 import NF4Storage


@hookimpl
def lora_plugins_register_storages(registrar: StorageRegistrar) -> None:
    """Registers every built-in storage."""
    for plugin in (NF4Storage(), Int8Storage()):
        registrar.add(plugin)
