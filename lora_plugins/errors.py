"""The errors of lora_plugins, and the near matches that their messages offer."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class LoraError(Exception):
    """Base class of every error that lora_plugins raises on purpose."""


class ConfigError(LoraError, ValueError):
    """A field of a configuration has a value that it cannot have."""


class TargetError(ConfigError):
    """A pattern matches no module, or modules that cannot be adapted as asked."""


class PluginError(LoraError):
    """A plugin cannot be loaded, breaks its contract, or claims what another one owns."""


class StateError(LoraError, RuntimeError):
    """The call does not fit the model's present state, such as training while merged."""


class MergeError(LoraError):
    """Merging would be lossy or would change a layer that is not adapted."""


class AdapterFileError(LoraError):
    """An adapter folder is damaged, incomplete, or was made for another model."""


def near(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Returns the sentence that offers near matches, or lists what there is.

    Args:
        name: What was asked for and does not exist.
        candidates: What exists.
        count: How many near matches to offer at most.
    """
    known = sorted(set(candidates))
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if matches:
        return f"Did you mean {listing(matches)}?"
    return f"There is {listing(known, 12)}." if known else "There are none."


def no_folder(path: Path) -> str:
    """Returns what is wrong with the path of a folder that is none: where its way breaks off, and what is near it."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    if (parent / missing).exists():
        return f"{parent / missing} is a file, and a folder is expected."
    beside = [each.name for each in parent.iterdir() if each.is_dir() and not each.name.startswith(".")]
    hint = f" {near(missing, beside)}" if beside and len(parent.parts) > 1 else ""
    return f"There is no folder {path}: {parent} has no {missing!r}.{hint}"


def listing(names: Iterable[str], most: int = 8) -> str:
    """Returns quoted names joined by commas; those beyond `most` are counted instead."""
    quoted = [repr(name) for name in names]
    if len(quoted) > most:
        quoted = [*quoted[:most], f"... ({len(quoted) - most} more)"]
    return ", ".join(quoted)
