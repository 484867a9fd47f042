"""The plugins that a config names and their options, checked before there is a model."""

from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, listing, noted
from lora_plugins.field_checks import check_known_options
from lora_plugins.plugins import (
    INITS,
    PLAIN,
    STORAGES,
    VARIANTS,
    InitPlugin,
    Registry,
    Storage,
    VariantPlugin,
    storage_options,
)


def named_plugins(
    config: LoraConfig, registry: Registry, *, restoring: bool = False
) -> tuple[InitPlugin, VariantPlugin | None, Storage | None]:
    """Returns the init of a config, its variant (None for plain LoRA) and its storage (None if it asks for none).

    There is no storage where an adapter is restored.

    Raises:
        PluginError: If there is no such init, variant or storage.
        ConfigError: If an option of one is unknown or wrong.
    """
    init = _init_of(config, registry)
    variant = None if config.variant == PLAIN else registry.get(VARIANTS, config.variant)
    return init, variant, None if restoring else storage_of(config, registry)


def storage_of(config: LoraConfig, registry: Registry) -> Storage | None:
    """Returns the storage that a config asks for; None if it asks for none.

    Raises:
        PluginError: If there is no such storage.
        ConfigError: If an option of it is unknown or wrong.
    """
    if config.quantize is None:
        return None
    plugin = registry.get(STORAGES, config.quantize)
    return Storage(plugin, storage_options(plugin, config.quantize_options))


def _init_of(config: LoraConfig, registry: Registry) -> InitPlugin:
    init = registry.get(INITS, config.init)
    check_known_options(f"init_options: {config.init!r}", config.init_options, init.options)
    with noted(f"check_options() of the init {init.name!r}"):
        init.check_options({**init.options, **config.init_options})
    decided = [key for key in init.storage_options if key in config.init_options]
    if decided and config.quantize:
        raise ConfigError(
            f"init_options: {listing(decided)} of {init.name!r} are those of quantize={config.quantize!r} here; say "
            "them in quantize_options."
        )
    return init
