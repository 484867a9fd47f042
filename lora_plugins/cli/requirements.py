"""What the metadata of lora-plugins say that an extra needs, and what of it is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging import requirements as parser
from packaging.utils import canonicalize_name

from lora_plugins.names import DISTRIBUTION


@dataclass(frozen=True)
class Requirement:
    """One package that is needed.

    Args:
        name: Name of its distribution.
        versions: Which versions do, as `>=1,<2`.
        installed: The version that is installed; None if none is.
        trouble: What is wrong with it; empty if nothing is.
    """

    name: str
    versions: str
    installed: str | None
    trouble: str

    def __str__(self) -> str:
        return f"{self.name}{self.versions}"

    @property
    def quoted(self) -> str:
        """As it is typed in a shell."""
        return f"'{self}'"


def requirements(extra: str) -> list[Requirement]:
    """Returns what an extra needs, or the core for the empty name; not what those packages need in turn.

    An extra that names another one of ours, as `vision` does `lightning`, needs what that needs.
    """
    parsed = [parser.Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    extras = _with_named(extra, [needed for needed in parsed if _is_ours(needed)])
    others = [needed for needed in parsed if not _is_ours(needed)]
    return [*dict.fromkeys(_looked_up(each) for each in others if any(_belongs(each, name) for name in extras))]


def _with_named(extra: str, ours: Sequence[parser.Requirement]) -> list[str]:
    """Returns an extra and those of ours that it names."""
    named = [name for needed in ours if _belongs(needed, extra) for name in sorted(needed.extras)]
    return [extra, *(inner for name in named for inner in _with_named(name, ours))]


def _is_ours(needed: parser.Requirement) -> bool:
    return canonicalize_name(needed.name) == canonicalize_name(DISTRIBUTION)


def _belongs(needed: parser.Requirement, extra: str) -> bool:
    """Whether a package is needed by an extra and not by the core already."""

    def applies(name: str) -> bool:
        return needed.marker is None or needed.marker.evaluate({"extra": name})

    return applies(extra) and (not extra or not applies(""))


def _looked_up(needed: parser.Requirement) -> Requirement:
    try:
        installed = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return Requirement(needed.name, str(needed.specifier), None, "not installed")
    fits = needed.specifier.contains(installed, prereleases=True)
    return Requirement(needed.name, str(needed.specifier), installed, "" if fits else f"{installed} is installed")
