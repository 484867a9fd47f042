"""What the metadata of lora-plugins say that an extra needs, and what of it is there."""

import importlib
import re
from dataclasses import dataclass
from importlib import metadata

from lora_plugins.plugins import DISTRIBUTION

_LINE = re.compile(
    r"""(?P<name>[\w.-]+)(\[[^]]*\])?\s*(?P<versions>[^;]*?)\s*(;.*extra\s*==\s*["'](?P<extra>[^"']+)["'])?$"""
)


@dataclass(frozen=True)
class Requirement:
    """One package that is needed.

    Args:
        name: Name of its distribution.
        versions: Which versions do, as `>=1,<2`.
        installed: The version that is installed; None if none is.
    """

    name: str
    versions: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.name}{self.versions}"

    @property
    def quoted(self) -> str:
        """As it is typed in a shell."""
        return f"'{self}'"

    @property
    def trouble(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.installed is None:
            return "not installed"
        return "" if _fits(self.installed, self.versions) else f"{self.installed} is installed"


def requirements(extra: str) -> list[Requirement]:
    """Returns what an extra needs, or the core for the empty name; not what those need in turn."""
    found = []
    for line in metadata.requires(DISTRIBUTION) or []:
        match = _LINE.match(line)
        assert match is not None, line
        if (match["extra"] or "") == extra and match["name"] != DISTRIBUTION:
            found.append(Requirement(match["name"], match["versions"], _installed(match["name"])))
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, versions: str) -> bool:
    """Whether a version is one of those asked for; without the package `packaging`, pip's own check has to do."""
    try:
        specifiers = importlib.import_module("packaging.specifiers")
    except ModuleNotFoundError:
        return True
    return bool(specifiers.SpecifierSet(versions).contains(version, prereleases=True))
