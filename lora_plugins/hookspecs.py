"""The hooks that a plugin of lora_plugins can implement.

A plugin is a module or an object with functions marked by `lora_plugins.hookimpl`, named by an entry point of the
group `lora_plugins`. Hooks are called once, when a registry is built, and before any model is touched. A hook
registers by the registrar it is handed and returns nothing; it must not import a heavy package only to name one of
its classes, for which import paths as strings serve.
"""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from lora_plugins.registry import InitRegistrar, LayerRegistrar

GROUP = "lora_plugins"
"""Name of the entry-point group, and of the pluggy project."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def lora_plugins_register_layers(registrar: "LayerRegistrar") -> None:
    """Called once while a registry is built, to add layer plugins.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of a `LayerPlugin`.
    """


@hookspec
def lora_plugins_register_inits(registrar: "InitRegistrar") -> None:
    """Called once while a registry is built, to add init plugins.

    Args:
        registrar: Call `registrar.add(plugin)` with each instance of an `InitPlugin`.
    """
