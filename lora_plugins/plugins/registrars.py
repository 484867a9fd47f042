"""What a hook is handed: it takes the objects of one plugin and refuses those that could not work."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, get_args

from torch import nn

from lora_plugins.errors import PluginError
from lora_plugins.plugins.init import InitPlugin, Needs
from lora_plugins.plugins.layer import BranchUse, LayerPlugin
from lora_plugins.plugins.registry import Owned, PluginInfo
from lora_plugins.plugins.variant import PLAIN, VariantPlugin

Plugin = TypeVar("Plugin", LayerPlugin, InitPlugin, VariantPlugin)

_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_module_class(value: Any) -> bool:
    return issubclass(value, nn.Module) if isinstance(value, type) else isinstance(value, str) and "." in value


def _are_module_classes(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_module_class, value))


def _are_options(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value)


Rules = Mapping[str, tuple[Callable[[Any], bool], str]]
"""By attribute: whether a value is proper, and what a proper one is."""

_A_NAME = (_is_name, "a name of letters, digits, '_', '-' and '.'")
_A_FLAG = (_is_flag, "True or False")


class Registrar(Generic[Plugin]):
    """Collects and validates what one plugin registers."""

    kind: ClassVar[type]
    rules: ClassVar[Rules]

    def __init__(self, info: PluginInfo) -> None:
        self.info = info
        self.plugins: list[Plugin] = []
        self.overrides: set[str] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.info.owner}>"

    def add(self, plugin: Plugin, *, override: bool = False) -> None:
        """Adds one plugin object.

        Args:
            plugin: An instance, not a class.
            override: Whether it takes the place of another plugin's object of the same name or for the same module
                class. Without it, two owners are an error. What is replaced shows in `lora-plugins plugins`.

        Raises:
            PluginError: If it is not of the expected class, an attribute cannot have its value, or the plugin
                registered that name already.
        """
        if not isinstance(plugin, self.kind):
            hint = " Register an instance, not the class." if isinstance(plugin, type) else ""
            raise PluginError(
                f"Plugin {self.info.owner} registered {plugin!r}, which is no {self.kind.__name__}.{hint}"
            )
        for attribute, (is_proper, expected) in self.rules.items():
            value = getattr(plugin, attribute, None)
            if not is_proper(value):
                self._refuse(plugin, f"sets {attribute!r} to {value!r}. It has to be {expected}")
        if any(plugin.name == other.name for other in self.plugins):
            self._refuse(plugin, f"has the name {plugin.name!r}, which the same plugin registered already")
        self._check(plugin)
        self.plugins.append(plugin)
        if override:
            self.overrides.add(plugin.name)

    @property
    def owned(self) -> list[Owned[Plugin]]:
        """What was added, with who brought it."""
        return [Owned(plugin, self.info, plugin.name in self.overrides) for plugin in self.plugins]

    def _check(self, plugin: Plugin) -> None:
        """Refuses what says one thing in one place and another in a second."""

    def _refuse(self, plugin: Plugin, what: str) -> None:
        raise PluginError(f"Plugin {self.info.owner}: {type(plugin).__name__} {what}; see {self.kind.__name__}.")


class LayerRegistrar(Registrar[LayerPlugin]):
    """Takes the layer types of one plugin: call `add` with instances of `LayerPlugin`."""

    kind = LayerPlugin
    rules: ClassVar = {
        "name": _A_NAME,
        "module_type": (_is_module_class, "a module class or its import path, 'package.module.Class'"),
        "lookup": _A_FLAG,
        "branch_types": (_are_module_classes, "a list of module classes or import paths"),
        "branch_use": (lambda value: value in get_args(BranchUse), f"one of {get_args(BranchUse)}"),
    }

    def _check(self, plugin: LayerPlugin) -> None:
        if plugin.branch_use == "never":
            return
        if type(plugin).branch is LayerPlugin.branch:
            self._refuse(plugin, f"says branch_use={plugin.branch_use!r} and has no branch")
        if not plugin.branch_types:
            self._refuse(
                plugin, f"says branch_use={plugin.branch_use!r} and names no branch_types, so it is never used"
            )


class InitRegistrar(Registrar[InitPlugin]):
    """Takes the inits of one plugin: call `add` with instances of `InitPlugin`."""

    kind = InitPlugin
    rules: ClassVar = {
        "name": _A_NAME,
        "options": (_are_options, "a mapping of option names to their defaults"),
        "identity": _A_FLAG,
        "changes_base": _A_FLAG,
        "needs": (lambda value: value is None or value in get_args(Needs), f"None or one of {get_args(Needs)}"),
    }

    def _check(self, plugin: InitPlugin) -> None:
        says_how = type(plugin).changed_base is not InitPlugin.changed_base
        if plugin.changes_base and not says_how:
            self._refuse(plugin, "says changes_base=True and has no changed_base")
        if says_how and not plugin.changes_base:
            self._refuse(plugin, "has a changed_base and says changes_base=False, so it is never used")


class VariantRegistrar(Registrar[VariantPlugin]):
    """Takes the variants of one plugin: call `add` with instances of `VariantPlugin`."""

    kind = VariantPlugin
    rules: ClassVar = {"name": _A_NAME}

    def _check(self, plugin: VariantPlugin) -> None:
        if plugin.name == PLAIN:
            self._refuse(plugin, f"has the name {PLAIN!r}, which stands for no variant")
