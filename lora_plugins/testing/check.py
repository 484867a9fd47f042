"""What a check is, how it fails, and how checks are run."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lora_plugins.errors import ConfigError, PluginError, StateError, near
from lora_plugins.testing.required import EvidentError, MismatchError
from lora_plugins.utils import own_randomness

Case = TypeVar("Case")
P = TypeVar("P")

_EVIDENT = (PluginError, StateError)
"""Errors that say what a plugin or a layer does wrong."""


class CheckError(AssertionError):
    """A plugin does not do what the framework relies on.

    Args:
        check: Name of the check.
        subject: The plugin and the options it was checked with.
        expected: What a plugin has to do.
        got: What this one did.
        usual_cause: What authors usually got wrong when it fails; empty where `got` tells the cause.
    """

    def __init__(self, check: str, subject: str, expected: str, got: str, usual_cause: str = "") -> None:
        self.check, self.expected, self.got, self.usual_cause = check, expected, got, usual_cause
        super().__init__(
            f"{subject} fails the check {check!r}.\n"
            f"  expected:    {expected}\n"
            f"  came:        {got}" + (f"\n  usual cause: {usual_cause}" if usual_cause else "")
        )


@dataclass(frozen=True)
class Check(Generic[Case]):
    """One thing that a plugin has to do.

    Args:
        name: Its name.
        run: Raises `MismatchError`, or whatever the plugin raises, if the plugin does not do it.
        expected: What a plugin has to do.
        usual_cause: What authors usually got wrong when it fails.
    """

    name: str
    run: Callable[[Case], None]
    expected: str
    usual_cause: str


def as_check(name: str, expected: str, usual_cause: str) -> Callable[[Callable[[Case], None]], Check[Case]]:
    """Makes a check of the function below it; the arguments are those of `Check`."""
    return lambda run: Check(name, run, expected, usual_cause)


def by_name(*groups: Iterable[Check[Case]]) -> dict[str, Check[Case]]:
    """Returns the checks of several groups by name, in order."""
    return {check.name: check for group in groups for check in group}


def chosen(checks: Mapping[str, Check[Case]], only: Collection[str] | None, skip: Collection[str]) -> list[Check[Case]]:
    """Returns the checks to run.

    Raises:
        ConfigError: If there is no check of a name, offering the near ones.
    """
    for name in (*(only or ()), *skip):
        if name not in checks:
            raise ConfigError(f"There is no check {name!r}. {near(name, checks)}")
    return [check for name, check in checks.items() if (only is None or name in only) and name not in skip]


def each_of(options: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Returns the options of a kit that checks a plugin with several, one after another.

    Raises:
        ConfigError: If they are those of one run.
    """
    if isinstance(options, Mapping):
        raise ConfigError(f"options lists those of one run after another: options=[{options!r}].")
    return options


def one_of(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Returns the options of a kit that checks a plugin with one mapping of them.

    Raises:
        ConfigError: If they are something else.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options maps names to values; it is not {options!r}. Check others by a call of their own.")
    return options or {}


def run(check: Check[Case], case: Case, subject: str) -> None:
    """Runs one check, without moving the random numbers of the process.

    Raises:
        CheckError: If the plugin fails it.
    """
    try:
        with own_randomness(0):
            check.run(case)
    except EvidentError as evident:
        raise CheckError(check.name, subject, check.expected, str(evident)) from evident.__cause__
    except MismatchError as mismatch:
        raise CheckError(check.name, subject, check.expected, str(mismatch), check.usual_cause) from None
    except Exception as error:  # whatever the plugin raises
        cause = "" if isinstance(error, _EVIDENT) else check.usual_cause
        raise CheckError(check.name, subject, check.expected, f"{type(error).__name__}: {error}", cause) from error


def elsewhere(plugin: P) -> P:
    """Returns a plugin as another process has it, which has seen nothing yet; itself if it cannot be copied."""
    try:
        return copy.deepcopy(plugin)
    except Exception:  # as of one that holds a lock or a module
        return plugin
