"""The registry that a plugin is checked with: it alone of its kind, and the built-in plugins of all others."""

from dataclasses import replace
from typing import Any

from lora_plugins.plugins import UNVERSIONED, PluginInfo, PluginKind, Registrar, Registry, default_registry

UNDER_TEST = PluginInfo("under test", "(given to the check)", UNVERSIONED)
"""Whom what is checked belongs to."""


def registry_with(kind: PluginKind[Any], plugin: Any) -> Registry:
    """Returns the registry for a plugin, which may be installed as well.

    Raises:
        PluginError: If the plugin could not be registered.
    """
    registrar = Registrar(kind, UNDER_TEST)
    registrar.add(plugin)
    built_in = default_registry(allow=())
    owned = {each.plugin.name: each for each in registrar.owned}
    return replace(built_in, plugins=(*built_in.plugins, UNDER_TEST), by_kind={**built_in.by_kind, kind.name: owned})
