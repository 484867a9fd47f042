"""Errors of the tasks, and helpers for their messages."""

from collections.abc import Iterable, Sequence

from lora_plugins.errors import ConfigError, LoraError, near

MAX_LISTED = 20


class DataError(LoraError, ValueError):
    """A data set on disk, or a label in a batch, cannot be used by the task."""


class WeightsError(LoraError, ValueError):
    """A file of weights and a network do not fit together."""


class ReportError(LoraError, ValueError):
    """A report of a run is not there, damaged, or of another kind than those it is compared with."""


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for an unknown name, with near matches; the caller raises it.

    `kind` is what the name stands for, as it reads in the sentence.
    """
    return ConfigError(f"Unknown {kind} {name!r}. {near(name if isinstance(name, str) else repr(name), known)}")


def listed(problems: Sequence[str]) -> str:
    """An indented list of problems, one per line: the first twenty, and the number of the others."""
    rest = len(problems) - MAX_LISTED
    lines = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    return "\n".join(lines + ([f"  ... and {rest} more"] if rest > 0 else []))


def unfetched(whose: str, error: OSError) -> ConfigError:
    """An error for pretrained weights, of `timm's resnet18` say, that cannot be had from where they are published."""
    return ConfigError(
        f"The pretrained weights of {whose} could not be fetched ({error}). Without a network, give the path of a "
        "safetensors file in `weights`."
    )
