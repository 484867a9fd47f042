"""Short flags for what is given most often, and configurations by the name of a shipped recipe."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_plugins import ConfigError
from lora_plugins.integrations.lightning.cli.recipes import PREFIX, recipe_path
from lora_plugins.writable import from_home

LARGEST_SEED = 2**32 - 1
"""That generators of random numbers take."""


def whole(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: If the text is none.
    """
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A number above 0.

    Raises:
        argparse.ArgumentTypeError: If the text is none.
    """
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A share of something that may be lost, `inf` for all of it.

    Raises:
        argparse.ArgumentTypeError: If the text is none.
    """
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def place(text: str) -> Path:
    """A file or folder, with a leading `~` read as the home.

    Raises:
        argparse.ArgumentTypeError: If the text is empty, which a path takes for the current folder.
    """
    return Path(from_home(nonempty(text)))


def nonempty(text: str) -> str:
    """A text.

    Raises:
        argparse.ArgumentTypeError: If it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty, perhaps from a shell variable that is not set")
    return text


def _number(text: str) -> float:
    """A number; NaN, which is within no bounds, if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def seed(text: str) -> int:
    """A seed.

    Raises:
        argparse.ArgumentTypeError: If the text is none.
    """
    if not (text.isascii() and text.isdigit()) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LARGEST_SEED}")
    return int(text)


@dataclass(frozen=True)
class ShortFlag:
    """A short flag, for every command that trains: the dotted one of `fit`, and what makes its value of the text."""

    stands_for: str
    takes: Callable[[str], Any]
    metavar: str
    meaning: str


SHORT: Mapping[str, ShortFlag] = {
    "--epochs": ShortFlag("--trainer.max_epochs", whole, "N", "passes over the data"),
    "--lr": ShortFlag("--model.init_args.lr", positive, "X", "learning rate"),
    "--batch-size": ShortFlag("--data.init_args.batch_size", whole, "N", "images in a step"),
    "--rank": ShortFlag("--lora.r", whole, "N", "of LoRA"),
    "--seed": ShortFlag("--seed_everything", seed, "N", "of all random numbers"),
}
"""The short flags; `train` has them too."""

_CONFIG = ("--config", "-c")


def expanded(arguments: Sequence[str]) -> list[str]:
    """Returns arguments with the dotted flags that short ones stand for, and with the paths of recipes.

    Raises:
        ConfigError: If there is no recipe of a name, or a short flag has a value that it cannot have.
    """
    found: list[str] = []
    before = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        is_config = (flag in _CONFIG and equals) or before in _CONFIG
        if is_config and (value or argument).startswith(PREFIX):
            path = str(recipe_path((value or argument).removeprefix(PREFIX)))
            found.append(f"{flag}={path}" if equals else path)
        elif flag in SHORT:
            if equals:
                _check(flag, value)
            found.append(f"{SHORT[flag].stands_for}{equals}{value}")
        else:
            if before in SHORT:
                _check(before, argument)
            found.append(argument)
        before = "" if equals else flag
    return found


def _check(flag: str, value: str) -> None:
    try:
        SHORT[flag].takes(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag}: {error}.") from error
