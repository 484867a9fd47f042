"""Errors that say what was wrong and offer the nearest name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_plugins.errors import ConfigError, LoraError, near

SHOWN = 20


class DataError(LoraError, ValueError):
    """A data set on disk, or a label in a batch, is not what the task can train on."""


class WeightsError(LoraError, ValueError):
    """A file of weights and a network do not fit together."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that a table does not hold.

    Args:
        kind: What the name stands for, as it should read in the sentence.
        name: The name that was asked for.
        known: The names that would have been understood.

    Returns:
        An error (to be raised by the caller) with near matches.
    """
    return ConfigError(f"Unknown {kind} {name!r}. {near(name, known)}")


def listed(problems: Sequence[str]) -> str:
    """The problems as an indented list, one a line, cut off after the first twenty with a count of the rest."""
    rest = len(problems) - SHOWN
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    return "\n".join(lines + ([f"  ... and {rest} more"] if rest > 0 else []))
