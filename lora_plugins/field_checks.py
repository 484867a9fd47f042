"""What fields of configs and arguments can hold: a check for each kind of value, which takes the name and the value.

Each raises a `ConfigError` that says what the field is, and what it was given.
"""

import math
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from lora_plugins.errors import ConfigError, near

Check = Callable[[str, Any], None]

MAX_RANK = 2**16
"""The largest rank that is taken: more than the smaller side of any weight that is trained in practice."""

_MAX_ALPHA = 2.0**127
"""The largest alpha: a float32 holds it."""


def check_fields(given: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Checks values by name.

    Raises:
        ConfigError: For the first one that is wrong.
    """
    for name, check in checks.items():
        check(name, given[name])


def shown(value: Any) -> str:
    """Returns a value for a message, cut where it is long; Python refuses to write integers of thousands of digits.

    Its class is named where it could be taken for another one: a list of a class of its own is written as a list is.
    """
    kind = type(value)
    try:
        text = reprlib.repr(value)
    except ValueError:
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {kind.__name__}"
    return text if kind.__module__ == "builtins" or kind.__name__ in text else f"{text} of the class {kind.__name__}"


def finite(what: str, value: Any) -> float:
    """Returns a number that a caller gave.

    Raises:
        ConfigError: If it is none, or not finite, naming it.
    """
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{what} is {shown(value)}. It has to be a finite number.")
    return number


def _fitting(fits: Callable[[Any], bool], what: str) -> Check:
    """Returns a check that refuses a value for which `fits` is false; its message says that the field is `what`."""

    def check_fitting(name: str, value: Any) -> None:
        if not fits(value):
            raise ConfigError(f"{name} is {what}, not {shown(value)}.")

    return check_fitting


def number_from(least: float, below: float = math.inf) -> Check:
    """A finite number, at least one and below another."""
    upper = "" if below == math.inf else f", below {below:g}"
    return _fitting(
        lambda value: _is_number(value) and math.isfinite(value) and least <= value < below,
        f"a finite number{_from(least)}{upper}",
    )


def whole_from(least: float) -> Check:
    """A whole number, at least one."""
    return _fitting(lambda value: is_whole(value) and value >= least, f"a whole number{_from(least)}")


def _from(least: float) -> str:
    return "" if least == -math.inf else f" of at least {least:g}"


check_rank = _fitting(
    lambda value: is_whole(value) and 1 <= value <= MAX_RANK, f"a rank, a whole number from 1 to {MAX_RANK}"
)
"""A rank."""

check_alpha = _fitting(lambda value: _is_number(value) and 0 < value <= _MAX_ALPHA, "a positive, finite number")
"""A numerator of a scaling."""

check_dropout = _fitting(
    lambda value: _is_number(value) and 0 <= value < 1, "a probability from 0 up to, not including, 1"
)
"""A probability that leaves something."""

check_factor = _fitting(lambda value: _is_number(value) and 0 < value < math.inf, "a positive, finite number")
"""What a learning rate is multiplied by."""

check_share = _fitting(lambda value: _is_number(value) and value >= 0, "a share, a number of at least 0")
"""A share of something that may be lost; infinite for all of it."""

check_whole = whole_from(-math.inf)
check_count = whole_from(1)

check_flag = _fitting(lambda value: isinstance(value, bool), "True or False")
"""A switch."""


def check_name(name: str, value: Any) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} holds {shown(value)}, which is not a name.")


def check_names(name: str, value: Any) -> None:
    """A list of names."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is a list of names, not {shown(value)}.")
    for entry in value:
        check_name(name, entry)


def _is_collection(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


check_some = _fitting(_is_collection, "a list")
"""A collection of any kind, but no text, and no mapping, whose values would be passed over."""


def check_ordered(name: str, value: Any) -> None:
    """A collection whose elements belong to those of another by their order, which a set does not keep."""
    check_some(name, value)
    if isinstance(value, set | frozenset):
        raise ConfigError(f"{name} is a set, which has no order. Give a list.")


def _lists(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Iterator) or (_is_collection(value) and all(map(fits, value)))


def check_chosen(name: str, value: Any) -> None:
    """A name, or a collection of names, each of which may be None."""
    if isinstance(value, str):
        return
    check_some(name, value)
    for entry in value:
        if entry is not None:
            check_name(name, entry)


check_paths = _fitting(
    lambda value: _lists(value, lambda entry: isinstance(entry, str | os.PathLike)), "a list of paths"
)
"""Paths; those of an iterator, such as that of `Path.glob`, are not looked at, since it can be read only once."""


def check_plugins(name: str, value: Any) -> None:
    """Plugins by name, as pairs; those of an iterator are not looked at."""
    if not _lists(value, _is_named):
        raise ConfigError(
            f"{name} lists pairs of a name and a module or object with hooks, as [('mine', MyPlugins())], not "
            f"{shown(value)}."
        )


def _is_named(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)


check_registry = _fitting(
    lambda value: callable(getattr(value, "layer_for", None)),
    "what build_registry([('mine', MyPlugins())]) returns",
)
"""The plugins that are there, as a registry."""


def check_parts(name: str, value: Any) -> None:
    """Names of parts of a layer, one at least."""
    check_names(name, value)
    if not value:
        raise ConfigError(f"{name} is empty. Name the parts to adapt, or leave the key out for the whole layer.")


def check_patterns(name: str, value: Any) -> None:
    """One expression, or a list of names."""
    (check_name if isinstance(value, str) else check_names)(name, value)


def check_blocks(name: str, value: Any) -> None:
    """Numbers or paths of blocks, one or several; None for all."""
    for block in value if isinstance(value, list | tuple) else [] if value is None else [value]:
        index = is_whole(block) and 0 <= block <= sys.maxsize
        if not index and not (isinstance(block, str) and block):
            raise ConfigError(
                f"{name} holds {shown(block)}. A block is a number from 0 on, or a path such as 'blocks.2'."
            )


def check_options(name: str, value: Any) -> None:
    """Values by name."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} maps names to values; it is not {shown(value)}.")
    for key in value:
        check_name(name, key)


def check_known_options(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Names of options that their owner has."""
    for key in given:
        if key not in known:
            raise ConfigError(f"{owner} has no option {key!r}. {near(key, known)}")


def check_kept_options(name: str, value: Any) -> None:
    """Values by name, of kinds that every file can hold."""
    check_options(name, value)
    for key, entry in value.items():
        if not is_plain(entry):
            raise ConfigError(
                f"{name}: {key!r} is {shown(entry)}, which no adapter file can hold. Options are texts, numbers, True, "
                "False, None, and lists and dictionaries of such; a path is str(path)."
            )


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False, which Python takes for such, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """Whether a value is of types that every file has: JSON, YAML and checkpoints."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


def optional(check: Check) -> Check:
    """None, or what another check takes."""

    def check_optional(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_optional


def map_of(check: Check) -> Check:
    """By name, values that another check takes."""

    def check_map(name: str, value: Any) -> None:
        check_options(name, value)
        for key, entry in value.items():
            check(f"{name}[{key!r}]", entry)

    return check_map


def choice_of(*choices: str) -> Check:
    """One of several words."""

    def check_choice(name: str, value: Any) -> None:
        if value not in choices:
            given = value if isinstance(value, str) else shown(value)
            raise ConfigError(f"{name} is {shown(value)}. {near(given, choices)}")

    return check_choice


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
