"""Who brought what: a plugin of a distribution, and an object that it registered."""

from dataclasses import dataclass
from typing import Any, Generic

from lora_plugins.plugins.kind import P, PluginKind

UNVERSIONED = "-"
"""Stands for the version of a plugin whose distribution has none or is not known."""


def versioned(distribution: str, version: str) -> str:
    """Returns a distribution with its version, where that is known, for messages."""
    return distribution if version == UNVERSIONED else f"{distribution} {version}"


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
        installed: Whether a distribution brings it; if not, a file or an object was given, which nothing blocks.
    """

    name: str
    distribution: str
    version: str
    provides: tuple[tuple[str, str], ...] = ()
    error: BaseException | None = None
    blocked: str = ""
    notes: tuple[str, ...] = ()
    installed: bool = True

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
        return f"{self.name!r} of {versioned(self.distribution, self.version)}"


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
