"""The hooks that a plugin of lora_plugins can implement.

A plugin is a module or an object with functions marked by `lora_plugins.hookimpl`, named by an entry point of the
group `lora_plugins`, or a Python file that the environment variable LORA_PLUGINS_LOAD names. Hooks are called once for
each registry that is built, which is before any model is touched: a process builds one registry for each choice of
allowed and blocked plugins, most processes a single one.

What holds for every hook:

- It registers with the registrar that it is given, and returns nothing.
- It sees no other plugin, and cannot rely on an order; to replace what another plugin owns, it calls
  `registrar.add(..., override=True)`.
- It must not import a heavy package only to name one of its classes, since an import path as a string will do. Nor may
  it touch a device, draw random numbers or change global state: it also runs when plugins are merely listed.
- If it raises, the plugin fails as a whole: nothing of it is registered, and its error is shown to whoever asks for
  something that is missing.

There is one hook for each kind of plugins: `lora_plugins_register_` and the name of the kind. `KINDS` lists them.
"""

from typing import Any

import pluggy

from lora_plugins.plugins.format import FORMATS, AdapterFormat
from lora_plugins.plugins.init import INITS, InitPlugin
from lora_plugins.plugins.kind import GROUP, PluginKind
from lora_plugins.plugins.layer import LAYERS, LayerPlugin
from lora_plugins.plugins.registrar import Registrar
from lora_plugins.plugins.storage import STORAGES, StoragePlugin
from lora_plugins.plugins.variant import VARIANTS, VariantPlugin

hookimpl = pluggy.HookimplMarker(GROUP)
hookspec = pluggy.HookspecMarker(GROUP)

LayerRegistrar = Registrar[LayerPlugin[Any]]
"""What the hook for layer types is handed."""

InitRegistrar = Registrar[InitPlugin]
"""What the hook for inits is handed."""

VariantRegistrar = Registrar[VariantPlugin]
"""What the hook for variants is handed."""

FormatRegistrar = Registrar[AdapterFormat]
"""What the hook for formats is handed."""

StorageRegistrar = Registrar[StoragePlugin]
"""What the hook for storages is handed."""


@hookspec
def lora_plugins_register_layers(registrar: LayerRegistrar) -> None:
    """Called once for each registry, before any model is seen, to add layer types.

    A plugin may not register a class that another plugin serves, unless it overrides that; subclasses of such a class
    are free. It may not keep the registrar, nor add to it later.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of a `LayerPlugin`.
    """


@hookspec
def lora_plugins_register_inits(registrar: InitRegistrar) -> None:
    """Called once for each registry, after the layer types of the same plugin, to add inits.

    A plugin may not register a name that another init has, unless it overrides that. It may not keep the registrar, nor
    add to it later.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of an `InitPlugin`.
    """


@hookspec
def lora_plugins_register_variants(registrar: VariantRegistrar) -> None:
    """Called once for each registry, after the inits of the same plugin, to add variants of LoRA.

    A plugin may not register a name that another variant has, unless it overrides that. It may not keep the registrar,
    nor add to it later.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of a `VariantPlugin`.
    """


@hookspec
def lora_plugins_register_formats(registrar: FormatRegistrar) -> None:
    """Called once for each registry, after the variants of the same plugin, to add formats of adapter files.

    A plugin may not register a name that another format has, unless it overrides that. It may not keep the registrar,
    nor add to it later.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of an `AdapterFormat`.
    """


@hookspec
def lora_plugins_register_storages(registrar: StorageRegistrar) -> None:
    """Called once for each registry, after the formats of the same plugin, to add storages of weights.

    A plugin may not register a name that another storage has, unless it overrides that. It may not keep the registrar,
    nor add to it later.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of a `StoragePlugin`.
    """


KINDS: tuple[PluginKind[Any], ...] = (LAYERS, INITS, VARIANTS, FORMATS, STORAGES)
"""All kinds of plugins, in the order in which a plugin's hooks are called."""
