"""What arguments of tasks and data modules can hold: checks beside those that a `LoraConfig` has as well."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import Check, check_count, check_name, is_whole, shown, whole_from


def check_size(name: str, value: Any) -> None:
    """Height and width of images."""
    sides = value if isinstance(value, list | tuple) else ()
    if len(sides) != 2 or any(not is_whole(side) or side < 1 for side in sides):
        raise ConfigError(f"{name} is height and width in pixels, such as (224, 224), not {shown(value)}.")


def check_callable(name: str, value: Any) -> None:
    """What is called to make something."""
    if not callable(value):
        raise ConfigError(
            f"{name} is {shown(value)}. It is called to make one: a class, or functools.partial of it. In YAML, give "
            "its class_path."
        )


def check_texts(name: str, value: Any) -> None:
    """A list of texts, one at least."""
    texts = value if isinstance(value, list | tuple) else ()
    if not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
        raise ConfigError(f"{name} is {shown(value)}; give a list of at least one text, and no empty one.")


def check_path(name: str, value: Any) -> None:
    """A path of a file or a folder, as a text or as Python's own."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} is {shown(value)}. It is a path, as a text that is not empty or a pathlib.Path.")


def check_png(name: str, value: Any) -> None:
    """A path of a PNG: other endings would be other formats, some of which cannot be written."""
    check_path(name, value)
    if Path(value).suffix.lower() != ".png":
        raise ConfigError(f"{name} is {shown(value)}. It is a PNG, whose name ends in .png.")


def check_paths(name: str, value: Any) -> None:
    """One path, or a list of at least one; whoever reads them says which one is empty."""
    paths = value if isinstance(value, list | tuple) else [value]
    if not paths or any(not isinstance(path, str | os.PathLike) for path in paths):
        raise ConfigError(f"{name} is {shown(value)}. It is a path, or a list of at least one.")


def check_columns(**columns: Any) -> None:
    """Names of columns, by argument."""
    for argument, column in columns.items():
        check_name(argument, column)


def check_digit(name: str, value: Any) -> None:
    """A digit."""
    if not _is_digit(value):
        raise ConfigError(f"{name} is a digit, a whole number from 0 to 9, not {shown(value)}.")


def check_digits(name: str, value: Any) -> None:
    """Digits, each once."""
    digits = _members(value)
    if not digits or not all(map(_is_digit, digits)) or len({*digits}) < len(digits):
        raise ConfigError(f"{name} is a list of digits from 0 to 9, each once, not {shown(value)}.")


def check_sides(name: str, value: Any) -> None:
    """The smallest and the largest side of squares."""
    if len(_members(value)) != 2:
        raise ConfigError(
            f"{name} is the smallest and the largest side in pixels, such as (18, 26), not {shown(value)}."
        )
    for side in value:
        check_count(name, side)


def check_indices(name: str, value: Any) -> None:
    """Places in a data set, one at least."""
    if not _members(value):
        raise ConfigError(f"{name} is a list of at least one whole number, not {shown(value)}.")
    for index in value:
        whole_from(0)(name, index)


def check_ignored(index: int, classes: Sequence[str]) -> None:
    """That the label that is not counted stands for none of the classes, which could still be predicted."""
    if 0 <= index < len(classes):
        raise ConfigError(
            f"ignore_index is {index}, which is the class {classes[index]!r}. What is not counted has a value of its "
            f"own in the labels, none of 0 to {len(classes) - 1}: such as 255 in masks."
        )


def instance_of(kind: type) -> Check:
    """What is of a class."""

    def check_instance(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise ConfigError(f"{name} is {shown(value)}. It has to be of the class {kind.__name__}.")

    return check_instance


def _members(value: Any) -> Sequence[Any]:
    """What a list or another sequence holds; nothing for everything else."""
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()


def _is_digit(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= 9
