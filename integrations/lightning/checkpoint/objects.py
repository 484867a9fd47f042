"""Hyperparameters that are objects: which ones a file may hold, and how a reader allows others.

Checkpoints are read without unpickling objects (`torch.load(weights_only=True)`), so a class, an Enum or a dataclass
among the hyperparameters has to be allowed by name. Harmless types of Python are allowed always.
"""

import argparse
import importlib
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from lora_plugins import ConfigError
from lora_plugins.errors import sentence
from lora_plugins.field_checks import check_some
from lora_plugins.utils import ending

Global = str | Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that may be in a file: itself, its import path, or itself and the path that the file has."""

_NUMPY_NUMBER: Any = np.float64().__reduce__()[0]

HARMLESS: tuple[Callable[..., Any] | tuple[Callable[..., Any], str], ...] = (
    frozenset,
    range,
    slice,
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    # Numbers of numpy: what it computes of a schedule is in the states of optimizers, and metrics are, in callbacks.
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    (_NUMPY_NUMBER, "numpy._core.multiarray.scalar"),
    (_NUMPY_NUMBER, "numpy.core.multiarray.scalar"),  # before numpy 2
)
"""Types that do nothing when they are made of what a file has."""

_ANY_ATTRIBUTE = "builtins.getattr"
"""What pickles call for a class inside of another one, and for a method. Who may call it may do anything."""


@contextmanager
def allowed(given: Sequence[Global] = ()) -> Iterator[None]:
    """Lets `torch.load(weights_only=True)` read harmless types and those that are given.

    Raises:
        ConfigError: If no list is given, or an import path leads nowhere.
    """
    check_some("allow_globals", given)
    found: list[Any] = [_resolved(each) if isinstance(each, str) else each for each in given]
    with torch.serialization.safe_globals([*HARMLESS, *found]):
        yield


def not_allowed(path: object) -> list[str] | None:
    """Returns the import paths of the types in a checkpoint that are not allowed; None where the file is damaged."""
    with torch.serialization.safe_globals([*HARMLESS]):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))  # type: ignore[arg-type]
        except Exception:  # a third of Python's errors, of a file that is no archive of torch, or not whole
            return None


def need_unpickling(objects: Sequence[str]) -> bool:
    """Whether what `not_allowed` has found cannot be allowed by name."""
    return _ANY_ATTRIBUTE in objects


def argument_for_objects(path: object) -> str:
    """Returns the argument that a reader of a checkpoint needs for the objects in it; empty if it needs none.

    What the file may call is called: it is one that this process has written.
    """
    with _nothing_else_allowed():
        objects = not_allowed(path)
        if objects is None:
            return ""
        try:
            with allowed([] if need_unpickling(objects) else objects):
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[arg-type]
        except Exception:  # such as a text of numpy, or a dictionary of another class, whose items torch leaves out
            return "weights_only=False"
        return f"allow_globals={objects!r}" if objects else ""


@contextmanager
def _nothing_else_allowed() -> Iterator[None]:
    """Forgets what this process has allowed by `add_safe_globals`, and another that reads the file has not."""
    given = torch.serialization.get_safe_globals()
    with ending(partial(torch.serialization.add_safe_globals, given)):
        torch.serialization.clear_safe_globals()
        yield


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError of what begins with a dot
        raise ConfigError(
            f"allow_globals names {path!r}, which cannot be imported: {sentence(error)} Where a class has moved "
            f"since, give it with its old name: (Class, {path!r})."
        ) from error
