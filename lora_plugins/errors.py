"""The errors of lora_plugins, and the near matches that their messages offer."""

import difflib
from collections.abc import Iterable


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


def listing(names: Iterable[str], most: int = 8) -> str:
    """Returns quoted names joined by commas; those beyond `most` are counted instead."""
    quoted = [repr(name) for name in names]
    if len(quoted) > most:
        quoted = [*quoted[:most], f"... ({len(quoted) - most} more)"]
    return ", ".join(quoted)
