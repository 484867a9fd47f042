"""Loads plugins one by one, and builds the registry."""

import difflib
import functools
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import getattr_static, isfunction
from pathlib import Path
from typing import Any

import pluggy

from lora_plugins.arguments import with_checked_call
from lora_plugins.config import LoraConfig
from lora_plugins.errors import PluginError, listing, near
from lora_plugins.plugins import hookspecs
from lora_plugins.plugins.discovery import Source, sources
from lora_plugins.plugins.hookspecs import KINDS
from lora_plugins.plugins.kind import GROUP, PluginKind
from lora_plugins.plugins.overrides import replaced
from lora_plugins.plugins.owned import Owned, PluginInfo
from lora_plugins.plugins.registrar import Registrar
from lora_plugins.plugins.registry import Registry

TRACE_VARIABLE = "LORA_PLUGINS_TRACE"
"""Environment variable; if it is set, every call of a hook is written to stderr."""


@functools.cache
def default_registry(allow: tuple[str, ...] | None = None, block: tuple[str, ...] = ()) -> Registry:
    """Returns the registry of all installed plugins; see `build_registry`. The first call of a process builds it."""
    return build_registry(allow=allow, block=block)


def registry_of(config: LoraConfig) -> Registry:
    """Returns the registry of the installed plugins that a config lets load."""
    if config.allow_plugins is None and not config.block_plugins:
        return default_registry()
    allow = None if config.allow_plugins is None else tuple(config.allow_plugins)
    return default_registry(allow, tuple(config.block_plugins))


@with_checked_call
def build_registry(
    extra: Iterable[tuple[str, Any]] = (),
    *,
    allow: Sequence[str] | None = None,
    block: Sequence[str] = (),
    files: Iterable[str | Path] = (),
) -> Registry:
    """Loads the built-in and the installed plugins, and what each of them registers.

    A plugin that fails to import or to register is kept in `Registry.plugins` with its error and provides nothing;
    it stops a run only when the run asks for something that is missing without it. A file is asked for by naming it.

    Args:
        extra: Further plugins, as pairs of a name and a module or object with hook implementations.
        allow: Names of the only installed plugins to load, besides the built-in ones; None for all. The environment
            variables of `lora_plugins.plugins.discovery` restrict further.
        block: Names of installed plugins not to load.
        files: Python files to load as plugins, besides those that the environment variable LORA_PLUGINS_LOAD names.

    Raises:
        PluginError: If two plugins claim one name or one module class, naming both, for each such clash; or if a file
            fails, from its error.
        ConfigError: If an argument is something else.
    """
    registry, clashes = found_plugins(extra, allow=allow, block=block, files=files)
    if clashes:
        raise PluginError("\n".join(clashes))
    return registry


def found_plugins(
    extra: Iterable[tuple[str, Any]] = (),
    *,
    allow: Sequence[str] | None = None,
    block: Sequence[str] = (),
    files: Iterable[str | Path] = (),
) -> tuple[Registry, list[str]]:
    """Returns what `build_registry` does, and a sentence for each clash; with one, the registry is only good to list.

    Raises:
        PluginError: If a file fails, from its error.
    """
    manager = _manager()
    infos: list[PluginInfo] = []
    owned: dict[str, list[Owned[Any]]] = {kind.name: [] for kind in KINDS}
    for source in sources(extra, allow, block, files):
        info, registrars = _loaded(manager, source)
        infos.append(info)
        for registrar in registrars:
            owned[registrar.kind.name] += registrar.owned
    _warn_of_misspelt(
        {"allow_plugins": allow or (), "block_plugins": block},
        [each for info in infos for each in (info.name, info.full_name)],
    )
    notes: list[_Note] = []
    clashes: list[str] = []
    for kind in KINDS:
        owned[kind.name], more, found = _settled(kind, owned[kind.name])
        notes += more
        clashes += found
    complete = {info: _completed(info, owned, notes) for info in infos}
    by_kind = {
        kind: {each.plugin.name: replace(each, info=complete[each.info]) for each in all_of_kind}
        for kind, all_of_kind in owned.items()
    }
    return Registry(tuple(complete.values()), by_kind), clashes


def _warn_of_misspelt(fields: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Warns of a name that is not installed and looks like one that is; others may be installed elsewhere."""
    for field, given in fields.items():
        for name in given:
            if name not in names and difflib.get_close_matches(name, names):
                warnings.warn(f"{field} names {name!r}, which is not installed. {near(name, names)}", stacklevel=4)


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if os.environ.get(TRACE_VARIABLE):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return manager


def _loaded(manager: pluggy.PluginManager, source: Source) -> tuple[PluginInfo, list[Registrar[Any]]]:
    """Returns a plugin with what it registers: nothing if it is blocked, or if it fails, which the plugin then says."""
    if source.info.blocked:
        return source.info, []
    try:
        return source.info, _register(manager, source.info, source.load())
    # Whatever a third-party module raises, only its own users are concerned; sys.exit() is how some end an import.
    except (Exception, SystemExit) as error:
        failed = replace(source.info, error=error)
        if source.required:
            raise PluginError(f"Plugin {failed.owner} {failed.state}") from error
        return failed, []


def _register(manager: pluggy.PluginManager, info: PluginInfo, plugin: Any) -> list[Registrar[Any]]:
    """Lets one plugin register; on any error pluggy forgets it again."""
    manager.register(plugin, name=f"{info.distribution}:{info.name}")
    try:
        _check_hooks(manager, info, plugin)
        registrars = [Registrar(kind, info) for kind in KINDS]
        others = [other for other in manager.get_plugins() if other is not plugin]
        for registrar in registrars:
            hook = registrar.kind.hook_name
            returned = manager.subset_hook_caller(hook, others)(registrar=registrar)
            registrar.close()
            if returned:
                raise PluginError(
                    f"Plugin {info.owner}: {hook} returned {returned[0]!r}. A hook returns nothing; it calls "
                    "registrar.add(...)."
                )
    except BaseException:
        manager.unregister(plugin)
        raise
    return registrars


def _check_hooks(manager: pluggy.PluginManager, info: PluginInfo, plugin: Any) -> None:
    callers = manager.get_hookcallers(plugin) or []
    if isinstance(plugin, type) and any(isfunction(getattr_static(plugin, caller.name, None)) for caller in callers):
        raise PluginError(f"Plugin {info.owner} is the class {plugin.__name__}. Name an instance of it, or a module.")
    unknown = [caller.name for caller in callers if not caller.has_spec()]
    if unknown:
        near_match = near(unknown[0], [kind.hook_name for kind in KINDS])
        raise PluginError(f"Plugin {info.owner} implements hooks that do not exist: {listing(unknown)}. {near_match}")
    if not callers:
        raise PluginError(
            f"Plugin {info.owner} implements no hook. Mark its functions with hookimpl, and let its entry point "
            "name the module they are in."
        )


_Note = tuple[PluginInfo, str]
"""A plugin, and what its listing says of it."""


def _settled(kind: PluginKind[Any], owned: list[Owned[Any]]) -> tuple[list[Owned[Any]], list[_Note], list[str]]:
    """Returns what is left, what to say of a plugin that replaces something and of the one it replaces, and clashes."""
    pairs, clashes = replaced(kind, owned)
    gone = {id(loser) for loser, _ in pairs}
    notes = []
    for loser, winner in pairs:
        what = f"{kind.title} {loser.plugin.name!r}"
        notes.append((winner.info, f"replaces {what} of {loser.info.owner}"))
        notes.append((loser.info, f"its {what} is replaced by {winner.info.owner}"))
    return [each for each in owned if id(each) not in gone], list(dict.fromkeys(notes)), clashes


def _completed(info: PluginInfo, owned: Mapping[str, list[Owned[Any]]], notes: list[_Note]) -> PluginInfo:
    provides = tuple((kind.title, each.plugin.name) for kind in KINDS for each in owned[kind.name] if each.info is info)
    return replace(info, provides=provides, notes=tuple(note for owner, note in notes if owner is info))
