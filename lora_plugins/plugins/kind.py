"""What a kind of plugins is, described once: registration, conflicts, listing, docs and the kit follow from it."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

GROUP = "lora_plugins"
"""Name of the entry-point group, and of the pluggy project."""

HOOK_PREFIX = "lora_plugins_register_"
"""What the name of every hook starts with; the name of a kind follows."""


class Named(Protocol):
    """What all plugin objects have."""

    @property
    def name(self) -> str:
        """The name that a config asks for, or that plans and files show."""


P = TypeVar("P", bound=Named)

Rule = tuple[Callable[[Any], bool], str]
"""Whether the value of an attribute is proper, and what a proper one is."""


@dataclass(frozen=True, kw_only=True)
class PluginKind(Generic[P]):
    """One kind of plugins.

    Args:
        name: Name of the kind, as the hook that registers it ends.
        title: What messages and listings call one of them.
        base: The class that its objects are instances of.
        rules: By attribute, what its value has to be.
        claims: What an object owns that no other object may own too, by what that is called in messages.
        contradiction: Says where an object contradicts itself; empty if it does not.
        reserved: Names that mean something else wherever a name of this kind is asked for.
        words: By what others call one of them, in small letters, what to write here.
    """

    name: str
    title: str
    base: type[Any]
    rules: Mapping[str, Rule]
    claims: Mapping[str, Callable[[P], str]]
    contradiction: Callable[[P], str] = lambda plugin: ""
    reserved: Sequence[str] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def hook_name(self) -> str:
        """Name of the hook by which plugins register objects of this kind."""
        return HOOK_PREFIX + self.name


def class_path(module_type: type | str) -> str:
    """Returns the path where a class is defined, for a path from which it is imported too, once its package is."""
    if isinstance(module_type, str):
        module, _, name = module_type.rpartition(".")
        found = getattr(sys.modules.get(module), "__dict__", {}).get(name)  # getattr(..., name) may import packages
        return class_path(found) if isinstance(found, type) else module_type
    return f"{module_type.__module__}.{module_type.__qualname__}"


def is_module_class(value: Any) -> bool:
    """Whether a value is a module class, or can be the import path of one."""
    return issubclass(value, nn.Module) if isinstance(value, type) else isinstance(value, str) and "." in value


def are_module_classes(value: Any) -> bool:
    """Whether a value is a sequence of module classes or import paths."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_module_class, value))


def are_options(value: Any) -> bool:
    """Whether a value maps names of options to their defaults."""
    return isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value)


def are_patterns(value: Any) -> bool:
    """Whether a value is a sequence of names or shell patterns."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value)


_NAME = re.compile(r"\w[\w.-]*", re.ASCII)

A_NAME: Rule = (
    lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None,
    "a name of letters, digits, '_', '-' and '.'",
)
A_FLAG: Rule = (lambda value: isinstance(value, bool), "True or False")
