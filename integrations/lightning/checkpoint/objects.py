"""Hyperparameters that are objects: which ones a file may hold, and how a reader allows others.

Checkpoints are read without unpickling objects (`torch.load(weights_only=True)`), so a class, an Enum or a dataclass
among the hyperparameters has to be allowed by name. Harmless types of Python are allowed always. Lightning's
`AttributeDict`, which torch reads in no case, is written as a plain dictionary, and the entry says where it was.
"""

import importlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import LightningModule

from lora_plugins import ConfigError
from lora_plugins.field_checks import check_some
from lora_plugins.integrations.lightning.checkpoint.entry import KEY

Global = str | Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that may be in a file: itself, its import path, or itself and the path that the file has."""

HARMLESS: tuple[Callable[..., Any], ...] = (
    frozenset,
    range,
    slice,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)
"""Types that do nothing when they are made of what a file has."""

_ANY_ATTRIBUTE = "builtins.getattr"
"""What pickles call for a class inside of another one, and for a method. Who may call it may do anything."""

HYPERPARAMETERS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
WRITTEN_AS_DICT = "attribute_dicts"

Path = tuple[Any, ...]
"""The keys that lead to a value in nested hyperparameters."""


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


def not_allowed(path: object) -> list[str]:
    """Returns the import paths of the types in a checkpoint that are not allowed; none where the file is damaged."""
    with torch.serialization.safe_globals([*HARMLESS]):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))  # type: ignore[arg-type]
        except Exception:  # of a file that is no archive of torch, or not whole
            return []


def need_unpickling(objects: Sequence[str]) -> bool:
    """Whether what `not_allowed` has found cannot be allowed by name."""
    return _ANY_ATTRIBUTE in objects


def argument_for_objects(path: object) -> str:
    """Returns the argument that a reader of a checkpoint needs for the objects in it; empty if it needs none.

    Args:
        path: The file, which this process has written: what it may call is called.
    """
    with _nothing_else_allowed():
        objects = not_allowed(path)
        if not objects:
            return ""
        try:
            with allowed([] if need_unpickling(objects) else objects):
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[arg-type]
        except Exception:  # such as a dictionary of another class, whose items torch does not put into it
            return "weights_only=False"
        return f"allow_globals={objects!r}"


@contextmanager
def _nothing_else_allowed() -> Iterator[None]:
    """Forgets what this process has allowed by `add_safe_globals`, and another that reads the file has not."""
    given = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(given)


def is_archive(path: object) -> bool:
    """Whether a file is a complete archive of torch, judged by its table of contents."""
    try:
        torch.serialization.get_unsafe_globals_in_checkpoint(path)  # type: ignore[arg-type]
    except Exception:  # a third of Python's errors, by what is damaged
        return False
    return True


def with_plain_dicts(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a checkpoint whose hyperparameters hold no `AttributeDict`, and what its entry says of them."""
    if HYPERPARAMETERS not in checkpoint:
        return dict(checkpoint), {}
    paths: list[Path] = []
    plain = _plain(checkpoint[HYPERPARAMETERS], (), paths)
    about = {WRITTEN_AS_DICT: [list(path) for path in paths]} if paths else {}
    return {**checkpoint, HYPERPARAMETERS: plain}, about


def with_attribute_dicts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint whose hyperparameters are what they were before `with_plain_dicts`."""
    result = dict(checkpoint)
    for path in sorted(map(tuple, checkpoint[KEY].get(WRITTEN_AS_DICT, [])), key=len, reverse=True):
        result[HYPERPARAMETERS] = _replaced(result[HYPERPARAMETERS], path)
    return result


def _plain(value: Any, path: Path, found: list[Path]) -> Any:
    if isinstance(value, AttributeDict):
        found.append(path)
    if type(value) is dict or isinstance(value, AttributeDict):
        return {key: _plain(each, (*path, key), found) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each, (*path, at), found) for at, each in enumerate(value))
    return value


def _replaced(value: Any, path: Path) -> Any:
    if not path:
        return AttributeDict(value)
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    items[path[0]] = _replaced(items[path[0]], path[1:])
    return type(value)(items) if isinstance(value, dict) else type(value)(items.values())


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"allow_globals names {path!r}, which cannot be imported: {error}. Where a class has moved since, give it "
            f"with its old name: (Class, {path!r})."
        ) from error
