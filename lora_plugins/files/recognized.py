"""Which format an adapter file has."""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lora_plugins.errors import AdapterFileError, listing, noted, nothing_there
from lora_plugins.field_checks import check_known_options
from lora_plugins.plugins import FORMATS, AdapterFormat, Registry, default_registry

PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""Endings of files that are read by running what is in them."""


def format_of(path: Path, registry: Registry | None = None) -> AdapterFormat:
    """Returns the format of an adapter file or folder.

    By default the built-in formats are asked first, and only where none of these knows the file those of all installed
    plugins.

    Raises:
        AdapterFileError: If no format, or more than one, knows it.
    """
    if not path.exists():
        raise AdapterFileError(
            f"{path} does not exist: {nothing_there(path)} An adapter is a folder or file such as save_adapter writes."
        )
    for known in (registry,) if registry else (default_registry(allow=()), default_registry()):
        formats = [owned.plugin for owned in known.of(FORMATS).values()]
        found = [each for each in formats if _recognizes(each, path)]
        if len(found) > 1:
            names = listing(each.name for each in found)
            raise AdapterFileError(f"{path} can be of the formats {names}. Say which: format={found[0].name!r}.")
        if found:
            return found[0]
    if path.suffix in PICKLED:
        instead = " Of a training, `lora-plugins export` and `merge` take it." if path.suffix == ".ckpt" else ""
        raise AdapterFileError(
            f"{path} is a pickle, which can run anything when it is read. Have whoever made it save it as "
            f".safetensors.{instead}"
        )
    raise AdapterFileError(
        f"{path} is an adapter of none of the formats {listing(each.name for each in formats)}."
        f"{_lacking(path, formats)}{_near_adapter(path, formats)}{known.absent()}"
    )


def _recognizes(known: AdapterFormat, path: Path) -> bool:
    with noted(f"recognizes() of the format {known.name!r}, for {path}"):
        return known.recognizes(path)


def _lacking(path: Path, formats: Iterable[AdapterFormat]) -> str:
    """Says which file of a format is not there, where another one is."""
    folder = path if path.is_dir() else path.parent
    for known in formats:
        absent = [name for name in known.file_names if not any(folder.glob(name))]
        present = {*known.file_names} - {*absent}
        if absent and any(path.is_dir() or path.match(name) for name in present):
            return (
                f" {listing(absent)} is not there, which the format {known.name!r} has beside {listing(present)}: copy "
                "the whole folder."
            )
    return ""


def _near_adapter(path: Path, formats: Iterable[AdapterFormat]) -> str:
    """Names adapters near a path that is none: in a folder, in those of its runs, around a file or beside it."""
    near = (*path.glob("*"), *path.glob("*/*")) if path.is_dir() else (path.parent, *path.parent.glob("*"))
    found = (str(each) for each in sorted(near) if each.is_dir() and any(_recognizes(known, each) for known in formats))
    some = [*islice(found, 4)]  # there may be thousands
    return f" Name the folder of an adapter: {listing(some, 3)}." if some else ""


def options_of(chosen: AdapterFormat, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns all options of a format: those that are given, and the defaults of the others.

    Raises:
        ConfigError: If the format has no option of a name.
    """
    check_known_options(f"The format {chosen.name!r}", given or {}, chosen.options)
    return {**chosen.options, **(given or {})}
