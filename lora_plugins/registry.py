"""What the installed plugins provide: lookup of layer types by module and of inits by name."""

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar, get_args

from torch import nn

from lora_plugins.errors import PluginError, near
from lora_plugins.init_plugin import InitPlugin, Needs
from lora_plugins.layer_plugin import LayerPlugin


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, as `lora-plugins plugins` lists it.

    Args:
        name: Name of the entry point, or of the object that was registered.
        distribution: Name of the installed distribution that brings it.
        version: Version of that distribution.
        layers: Names of the layer types it registered.
        inits: Names of the inits it registered.
        error: Why it could not be loaded; None if it was.
        blocked: Whether an environment variable keeps it from loading.
    """

    name: str
    distribution: str
    version: str
    layers: tuple[str, ...] = ()
    inits: tuple[str, ...] = ()
    error: BaseException | None = None
    blocked: bool = False

    @property
    def state(self) -> str:
        """`loaded`, `blocked`, or `failed` with the reason."""
        if self.blocked:
            return "blocked"
        return "loaded" if self.error is None else f"failed: {type(self.error).__name__}: {self.error}"

    @property
    def owner(self) -> str:
        """The plugin and its distribution, for messages."""
        return f"{self.name!r} of {self.distribution} {self.version}"


Plugin = TypeVar("Plugin", LayerPlugin, InitPlugin)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_need(value: object) -> bool:
    return value is None or value in get_args(Needs)


def _is_module_class(value: object) -> bool:
    return issubclass(value, nn.Module) if isinstance(value, type) else _is_name(value)


class _Registrar(Generic[Plugin]):
    """Collects and validates what one plugin registers."""

    kind: ClassVar[type]
    required: ClassVar[Mapping[str, Callable[[object], bool]]]

    def __init__(self, info: PluginInfo) -> None:
        self.info = info
        self.plugins: list[Plugin] = []

    def add(self, plugin: Plugin) -> None:
        """Adds one plugin object.

        Raises:
            PluginError: If it is not an instance of the expected class, or has no proper name or module class.
        """
        if not isinstance(plugin, self.kind):
            hint = " Register an instance, not the class." if isinstance(plugin, type) else ""
            raise PluginError(
                f"Plugin {self.info.owner} registered {plugin!r}, which is no {self.kind.__name__}.{hint}"
            )
        for attribute, is_proper in self.required.items():
            value = getattr(plugin, attribute, None)
            if not is_proper(value):
                raise PluginError(
                    f"Plugin {self.info.owner}: {type(plugin).__name__} does not set {attribute!r} properly, but to "
                    f"{value!r}; see {self.kind.__name__}."
                )
        self.plugins.append(plugin)


class LayerRegistrar(_Registrar[LayerPlugin]):
    """Takes the layer types of one plugin: call `add` with instances of `LayerPlugin`."""

    kind = LayerPlugin
    required: ClassVar = {"name": _is_name, "module_type": _is_module_class}


class InitRegistrar(_Registrar[InitPlugin]):
    """Takes the inits of one plugin: call `add` with instances of `InitPlugin`."""

    kind = InitPlugin
    required: ClassVar = {"name": _is_name, "needs": _is_need}


@dataclass(frozen=True)
class Owned(Generic[Plugin]):
    """A registered plugin object and who brought it."""

    plugin: Plugin
    info: PluginInfo


@dataclass(frozen=True)
class Registry:
    """All layer types and inits of one set of plugins; built by `lora_plugins.manager.build_registry`.

    Args:
        plugins: Every plugin that was found, loaded or not.
        layers: Layer types by name.
        inits: Inits by name.
    """

    plugins: tuple[PluginInfo, ...]
    layers: Mapping[str, Owned[LayerPlugin]]
    inits: Mapping[str, Owned[InitPlugin]]

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
        owned = self.inits.get(name)
        if owned is not None:
            return owned.plugin
        failed = [info for info in self.plugins if info.error is not None]
        failures = "".join(f" Plugin {info.owner} {info.state.rstrip('.')}." for info in failed)
        blocked = "".join(f" Plugin {info.owner} is blocked." for info in self.plugins if info.blocked)
        # The plugin of that very name is the likeliest cause; a mere typo has none.
        typo = bool(difflib.get_close_matches(name, self.inits, cutoff=0.5))
        cause = next(
            (i.error for i in sorted(failed, key=lambda i: i.name != name) if i.name == name or not typo), None
        )
        raise PluginError(f"There is no init {name!r}. {near(name, self.inits)}{failures}{blocked}") from cause


def class_path(module_type: type | str) -> str:
    """Returns the import path of a class; a path is returned as it is."""
    if isinstance(module_type, str):
        return module_type
    return f"{module_type.__module__}.{module_type.__qualname__}"
