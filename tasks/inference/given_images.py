"""The images that a user names, each read once."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins.integrations.lightning.console import followed
from lora_plugins.tasks.data import ERROR, Size
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import absolute, named_images, read_all, read_image


def given_images(
    images: str | Path | Sequence[str | Path], on_problem: str, resized_to: Size | None = None
) -> dict[str, Path]:
    """Finds images, of which paths, folders and patterns are given, and reads each once.

    Returns:
        Those that can be read, by their paths below the folder that all of them are in.

    Raises:
        DataError: If there are none, or some cannot be read and are not to be left out.
    """
    return _named(_readable(named_images(images), on_problem, resized_to))


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """The images by their paths below the folder that all of them are in."""
    places = {absolute(path): path for path in paths}
    common = os.path.commonpath([place.parent for place in places])
    return {place.relative_to(common).as_posix(): path for place, path in places.items()}


def _readable(paths: Sequence[Path], on_problem: str, resized_to: Size | None) -> list[Path]:
    reading = read_all(paths, lambda path: read_image(path, resized_to).size)  # images would fill the memory
    found = [*followed(reading, "Reading files", len(paths))]
    problems = [str(each) for each in found if isinstance(each, DataError)]
    message = f"{len(problems)} of {len(paths)} images cannot be read:\n{listed(problems)}"
    if problems and on_problem == ERROR:
        raise DataError(f"{message}\nWith --skip (on_problem='skip'), such images are left out.")
    if len(problems) == len(paths):
        raise DataError(message)
    if problems:
        rank_zero_warn(message)
    return [path for path, each in zip(paths, found, strict=True) if not isinstance(each, DataError)]
