"""What the installed plugins provide: lookup of layer types by module and of inits by name."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import nn

from lora_plugins.errors import PluginError, near
from lora_plugins.plugins.init import InitPlugin
from lora_plugins.plugins.layer import LayerPlugin
from lora_plugins.plugins.variant import PLAIN, VariantPlugin


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, as `lora-plugins plugins` lists it.

    Args:
        name: Name of the entry point, or of the object that was registered.
        distribution: Name of the installed distribution that brings it.
        version: Version of that distribution.
        layers: Names of the layer types it registered.
        inits: Names of the inits it registered.
        variants: Names of the variants it registered.
        error: Why it could not be loaded; None if it was.
        blocked: What keeps it from loading, such as the name of an environment variable; empty if nothing does.
        notes: What it replaces, and what of it is replaced.
    """

    name: str
    distribution: str
    version: str
    layers: tuple[str, ...] = ()
    inits: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
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

    @property
    def owner(self) -> str:
        """The plugin and its distribution, for messages."""
        return f"{self.name!r} of {self.distribution} {self.version}"


Plugin = TypeVar("Plugin", LayerPlugin, InitPlugin, VariantPlugin)


@dataclass(frozen=True)
class Owned(Generic[Plugin]):
    """A registered plugin object and who brought it.

    Args:
        plugin: The object.
        info: Who brought it.
        override: Whether it was registered to replace another one.
    """

    plugin: Plugin
    info: PluginInfo
    override: bool = False


@dataclass(frozen=True)
class Registry:
    """All layer types and inits of one set of plugins; built by `lora_plugins.plugins.manager.build_registry`.

    Args:
        plugins: Every plugin that was found, loaded or not.
        layers: Layer types by name.
        inits: Inits by name.
        variants: Variants by name.
    """

    plugins: tuple[PluginInfo, ...]
    layers: Mapping[str, Owned[LayerPlugin]]
    inits: Mapping[str, Owned[InitPlugin]]
    variants: Mapping[str, Owned[VariantPlugin]] = field(default_factory=dict)

    def layer_for(self, module_class: type[nn.Module]) -> LayerPlugin | None:
        """Returns the plugin of the most specific class in the MRO of a module class; None if there is none."""
        return next(
            (self._by_class[path] for path in map(class_path, module_class.__mro__) if path in self._by_class),
            None,
        )

    @functools.cached_property
    def _by_class(self) -> Mapping[str, LayerPlugin]:
        return {class_path(owned.plugin.module_type): owned.plugin for owned in self.layers.values()}

    def init(self, name: str) -> InitPlugin:
        """Returns an init by name.

        Raises:
            PluginError: If there is none of that name, from the error of a plugin that failed to load if one did.
        """
        return self._named("init", name, self.inits)

    def variant(self, name: str) -> VariantPlugin | None:
        """Returns a variant by name; None for plain LoRA.

        Raises:
            PluginError: If there is none of that name, from the error of a plugin that failed to load if one did.
        """
        return None if name == PLAIN else self._named("variant", name, self.variants)

    def _named(self, kind: str, name: str, owners: Mapping[str, Owned[Plugin]]) -> Plugin:
        if name in owners:
            return owners[name].plugin
        # A mere typo has no plugin as its cause.
        typo = bool(difflib.get_close_matches(name, owners, cutoff=0.5))
        cause = self.cause(name)
        named = any(info.name == name for info in self.plugins)
        known = [*owners, PLAIN] if kind == "variant" else [*owners]
        raise PluginError(f"There is no {kind} {name!r}. {near(name, known)}{self.absent()}") from (
            cause if named or not typo else None
        )

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


def class_path(module_type: type | str) -> str:
    """Returns the import path of a class; a path is returned as it is."""
    if isinstance(module_type, str):
        return module_type
    return f"{module_type.__module__}.{module_type.__qualname__}"
