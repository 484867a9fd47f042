"""Where plugins come from: entry points, local files and code; and which of them may load."""

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_plugins.errors import PluginError
from lora_plugins.names import DISTRIBUTION
from lora_plugins.plugins.kind import GROUP
from lora_plugins.plugins.owned import UNVERSIONED, PluginInfo

BLOCK_VARIABLE = "LORA_PLUGINS_BLOCK"
"""Environment variable with the names of plugins that are not loaded, separated by commas.

Here and where plugins are allowed, `DISTRIBUTION:NAME` names one of several that have the same name.
"""

ALLOW_VARIABLE = "LORA_PLUGINS_ALLOW"
"""Environment variable with the names of the only installed plugins that are loaded, besides our own."""

LOAD_VARIABLE = "LORA_PLUGINS_LOAD"
"""Environment variable with the paths of Python files that are loaded as plugins, separated as those of PATH are."""


@dataclass(frozen=True)
class Source:
    """One plugin that was found.

    Args:
        info: What it is, and whether it is kept from loading.
        load: Imports it, and returns the module or object with its hooks.
        required: Whether it was asked for by itself, so that its failure is that of the whole.
    """

    info: PluginInfo
    load: Callable[[], Any]
    required: bool = False


def names_in(variable: str) -> list[str]:
    """Returns the names that an environment variable lists, separated by commas."""
    return [name for part in os.environ.get(variable, "").split(",") if (name := part.strip())]


def files_in(variable: str) -> list[Path]:
    """Returns the paths that an environment variable lists, separated as those of PATH are."""
    return [Path(part) for part in os.environ.get(variable, "").split(os.pathsep) if part]


def require_installation() -> None:
    """Raises a PluginError if this package is imported but not installed: its plugins are found by its metadata."""
    try:
        metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise PluginError(
            f"lora_plugins is imported from {Path(__file__).parents[1]}, but {DISTRIBUTION} is not installed, so that "
            "none of its plugins is found. Install it: run `pip install .` in its checkout."
        ) from error


def sources(
    extra: Iterable[tuple[str, Any]], allow: Sequence[str] | None, block: Sequence[str], files: Iterable[str | Path]
) -> Iterator[Source]:
    """Yields every plugin there is, our own first; the arguments are those of `build_registry`."""
    require_installation()
    reasons = _reasons(allow, block)
    points = sorted(metadata.entry_points(group=GROUP), key=lambda p: (_distribution(p)[0] != DISTRIBUTION, p.name))
    for point in points:
        info = PluginInfo(point.name, *_distribution(point))
        blocked = "" if info.distribution == DISTRIBUTION else reasons(info)
        yield Source(replace(info, blocked=blocked), point.load)
    for path in (Path(path).expanduser().absolute() for path in [*files_in(LOAD_VARIABLE), *files]):
        info = PluginInfo(path.stem, str(path), UNVERSIONED, installed=False)
        yield Source(info, functools.partial(load_file, path), required=True)
    for name, plugin in extra:
        info = PluginInfo(name, "(given in code)", UNVERSIONED, installed=False)
        yield Source(info, functools.partial(lambda plugin: plugin, plugin))


def _reasons(allow: Sequence[str] | None, block: Sequence[str]) -> Callable[[PluginInfo], str]:
    """Returns a function that says what keeps a plugin from loading; nothing for most."""
    blocking = {BLOCK_VARIABLE: names_in(BLOCK_VARIABLE), "block_plugins": block}
    allowing = {ALLOW_VARIABLE: names_in(ALLOW_VARIABLE) or None, "allow_plugins": allow}

    def reason(info: PluginInfo) -> str:
        own = {info.name, info.full_name}
        found = [what for what, names in blocking.items() if not own.isdisjoint(names)]
        found += [what for what, names in allowing.items() if names is not None and own.isdisjoint(names)]
        return found[0] if found else ""

    return reason


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("(unknown)", UNVERSIONED)


def load_file(path: Path) -> ModuleType:
    """Imports a Python file as a module of its own, once a process.

    Raises:
        PluginError: If there is no such file.
    """
    if not path.is_file():
        raise PluginError(f"{path} does not exist. A local plugin is a Python file with functions marked by hookimpl.")
    name = f"lora_plugins_file_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file: its name has to end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
