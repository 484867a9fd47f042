"""Finds plugins, loads them one by one, and builds the registry."""

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any, TypeVar

import pluggy

from lora_plugins import hookspecs
from lora_plugins.errors import PluginError, listing
from lora_plugins.hookspecs import GROUP
from lora_plugins.init_plugin import InitPlugin
from lora_plugins.layer_plugin import LayerPlugin
from lora_plugins.registry import InitRegistrar, LayerRegistrar, Owned, PluginInfo, Registry, class_path

BLOCK_VARIABLE = "LORA_PLUGINS_BLOCK"
"""Environment variable with the names of plugins that are not loaded, separated by commas."""

DISTRIBUTION = "lora-plugins"


@functools.cache
def default_registry() -> Registry:
    """Returns the registry of all installed plugins, built at the first call of the process."""
    return build_registry()


def build_registry(extra: Iterable[tuple[str, Any]] = ()) -> Registry:
    """Loads the built-in and the installed plugins, and what each of them registers.

    A plugin that fails to import or to register is kept in `Registry.plugins` with its error and provides nothing;
    it stops a run only when the run asks for something that is missing without it.

    Args:
        extra: Further plugins, as pairs of a name and a module or object with hook implementations.

    Raises:
        PluginError: If two plugins claim one name or one module class, naming both.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    infos: list[PluginInfo] = []
    layers: list[Owned[LayerPlugin]] = []
    inits: list[Owned[InitPlugin]] = []
    for info, load in _sources(extra):
        if info.blocked:
            infos.append(info)
            continue
        try:
            layer_plugins, init_plugins = _register(manager, info, load())
        except Exception as error:  # whatever a third-party module raises, only its own users are concerned
            infos.append(replace(info, error=error))
            continue
        loaded = replace(info, layers=tuple(p.name for p in layer_plugins), inits=tuple(p.name for p in init_plugins))
        infos.append(loaded)
        layers += [Owned(plugin, loaded) for plugin in layer_plugins]
        inits += [Owned(plugin, loaded) for plugin in init_plugins]
    _unique("module class", [(class_path(owned.plugin.module_type), owned) for owned in layers])
    return Registry(
        plugins=tuple(infos),
        layers=_unique("layer type", [(owned.plugin.name, owned) for owned in layers]),
        inits=_unique("init", [(owned.plugin.name, owned) for owned in inits]),
    )


def _sources(extra: Iterable[tuple[str, Any]]) -> Iterator[tuple[PluginInfo, Any]]:
    """Yields each plugin's identity and a function that loads it, our own plugins first."""
    blocked = {name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",")}
    points = sorted(metadata.entry_points(group=GROUP), key=lambda p: (_distribution(p)[0] != DISTRIBUTION, p.name))
    for point in points:
        name, version = _distribution(point)
        ours = name == DISTRIBUTION
        yield PluginInfo(point.name, name, version, blocked=point.name in blocked and not ours), point.load
    for name, plugin in extra:
        yield PluginInfo(name, "(given in code)", "-"), functools.partial(lambda plugin: plugin, plugin)


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("(unknown)", "-")


def _register(
    manager: pluggy.PluginManager, info: PluginInfo, plugin: Any
) -> tuple[list[LayerPlugin], list[InitPlugin]]:
    """Lets one plugin register; on any error pluggy forgets it again."""
    manager.register(plugin, name=f"{info.distribution}:{info.name}")
    try:
        callers = manager.get_hookcallers(plugin) or []
        unknown = [caller.name for caller in callers if not caller.has_spec()]
        if unknown:
            raise PluginError(f"Plugin {info.owner} implements hooks that do not exist: {listing(unknown)}.")
        layer_registrar = LayerRegistrar(info)
        init_registrar = InitRegistrar(info)
        others = [other for other in manager.get_plugins() if other is not plugin]
        manager.subset_hook_caller("lora_plugins_register_layers", others)(registrar=layer_registrar)
        manager.subset_hook_caller("lora_plugins_register_inits", others)(registrar=init_registrar)
    except BaseException:
        manager.unregister(plugin)
        raise
    return layer_registrar.plugins, init_registrar.plugins


Plugin = TypeVar("Plugin", LayerPlugin, InitPlugin)


def _unique(kind: str, pairs: list[tuple[str, Owned[Plugin]]]) -> dict[str, Owned[Plugin]]:
    owners: dict[str, Owned[Plugin]] = {}
    for key, owned in pairs:
        first = owners.setdefault(key, owned)
        if first is not owned:
            raise PluginError(
                f"Two plugins own the {kind} {key!r}: {first.info.owner} and {owned.info.owner}. Uninstall one of "
                f"them, or set {BLOCK_VARIABLE}={owned.info.name}."
            )
    return owners
