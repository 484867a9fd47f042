"""The built-in variants, registered through the same door as anyone else's."""

from lora_plugins.plugins import VariantRegistrar, hookimpl
from lora_plugins.variants.dora import DoraVariant


@hookimpl
def lora_plugins_register_variants(registrar: VariantRegistrar) -> None:
    """Registers every built-in variant."""
    registrar.add(DoraVariant())
