"""What the installed plugins provide: lookup of layer types by module class, and of everything by name."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

from torch import nn

from lora_plugins.errors import PluginError, near, near_matches
from lora_plugins.plugins.kind import P, PluginKind, class_path
from lora_plugins.plugins.layer import LAYERS, LayerPlugin


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, as `lora-plugins plugins` lists it.

    Args:
        name: Name of the entry point, or of the object that was registered.
        distribution: Name of the installed distribution that brings it.
        version: Version of that distribution.
        provides: The title of the kind and the name of each object that it registered.
        error: Why it could not be loaded; None if it was.
        blocked: What keeps it from loading, such as the name of an environment variable; empty if nothing does.
        notes: What it replaces, and what of it is replaced.
    """

    name: str
    distribution: str
    version: str
    provides: tuple[tuple[str, str], ...] = ()
    error: BaseException | None = None
    blocked: str = ""
    notes: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """`loaded`, perhaps with notes, `blocked by` something, or `failed` with the reason."""
        if self.blocked:
            return f"blocked by {self.blocked}"
        if self.error is not None:
            return f"failed: {type(self.error).__name__}: {self.error}"
        return "; ".join(["loaded", *self.notes])

    def names(self, kind: PluginKind[Any]) -> tuple[str, ...]:
        """Returns the names of what it registered of a kind."""
        return tuple(name for title, name in self.provides if title == kind.title)

    @property
    def full_name(self) -> str:
        """Tells it from a plugin of the same name in another distribution."""
        return f"{self.distribution}:{self.name}"

    @property
    def owner(self) -> str:
        """The plugin and its distribution, for messages."""
        return f"{self.name!r} of {self.distribution} {self.version}"


@dataclass(frozen=True)
class Owned(Generic[P]):
    """A registered plugin object and who brought it.

    Args:
        plugin: The object.
        info: Who brought it.
        override: Whether it was registered to replace another one.
    """

    plugin: P
    info: PluginInfo
    override: bool = False


@dataclass(frozen=True)
class Registry:
    """Everything that one set of plugins provides; built by `lora_plugins.plugins.build_registry`.

    Args:
        plugins: Every plugin that was found, loaded or not.
        by_kind: By the name of a kind, its objects by their names.
    """

    plugins: tuple[PluginInfo, ...]
    by_kind: Mapping[str, Mapping[str, Owned[Any]]]

    def of(self, kind: PluginKind[P]) -> Mapping[str, Owned[P]]:
        """Returns all objects of a kind by name."""
        return self.by_kind.get(kind.name, {})

    def get(self, kind: PluginKind[P], name: str) -> P:
        """Returns an object by its kind and name.

        Raises:
            PluginError: If there is none of that name, from the error of a plugin that failed to load if one did.
        """
        owned = self.of(kind)
        if name in owned:
            return owned[name].plugin
        typo = bool(near_matches(name, owned))  # which has no plugin as its cause
        named = any(info.name == name for info in self.plugins)
        said = kind.words.get(name.lower()) or near(name, [*owned, *kind.reserved])
        cause = self.cause(name) if named or not typo else None
        raise PluginError(f"There is no {kind.title} {name!r}. {said}{self.absent()}") from cause

    def layer_for(self, module_class: type[nn.Module]) -> LayerPlugin[Any] | None:
        """Returns the plugin of the most specific class in the MRO of a module class; None if there is none."""
        # A path leads to its class once its package is imported, which may be after the registry was built.
        by_class = {**self._by_class, **{class_path(path): plugin for path, plugin in self._by_path.items()}}
        return next((by_class[path] for path in map(class_path, module_class.__mro__) if path in by_class), None)

    @functools.cached_property
    def _by_class(self) -> Mapping[str, LayerPlugin[Any]]:
        return {class_path(each.module_type): each for each in self._layers if not isinstance(each.module_type, str)}

    @functools.cached_property
    def _by_path(self) -> Mapping[str, LayerPlugin[Any]]:
        return {each.module_type: each for each in self._layers if isinstance(each.module_type, str)}

    @functools.cached_property
    def _layers(self) -> Sequence[LayerPlugin[Any]]:
        owned = cast(Mapping[str, Owned[LayerPlugin[Any]]], self.of(LAYERS))
        return [each.plugin for each in owned.values()]

    def absent(self) -> str:
        """Returns sentences on the plugins that failed or are blocked, for a message about something missing."""
        return "".join(
            f" Plugin {info.owner} {'is ' if info.blocked else ''}{info.state.rstrip('.')}."
            for info in self.plugins
            if info.blocked or info.error is not None
        )

    def cause(self, name: str = "") -> BaseException | None:
        """Returns the error of a plugin that failed, that of the plugin called `name` first; None if none did."""
        failed = [info for info in self.plugins if info.error is not None]
        return min(failed, key=lambda info: info.name != name).error if failed else None
