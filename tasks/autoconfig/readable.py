"""Whether images and masks can be read, before anything is trained on them."""

from collections.abc import Sequence
from pathlib import Path

from lora_plugins.tasks.errors import DataError, counted, listed
from lora_plugins.tasks.files import read_errors, shown_size


def unreadable(paths: Sequence[Path]) -> list[str]:
    """The images that cannot be read, each with the reason, as their headers tell."""
    return [error for error in read_errors(paths, shown_size) if error]


def unequal(pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """The masks that cannot be read, or differ in size from their images, which are rotated as their files say."""
    return [error for error in read_errors(pairs, _check_sizes) if error]


def check_no_problems(problems: Sequence[str]) -> None:
    """Raises one error that lists all problems of the data, if there are some."""
    if problems:
        raise DataError(f"The data cannot be used ({counted(len(problems), 'problem')}):\n{listed(problems)}")


def _check_sizes(pair: tuple[Path, Path]) -> None:
    image, mask = pair
    (width, height), size = shown_size(mask), shown_size(image)
    if (width, height) != size:
        hint = ": if its EXIF turns the image upright, turn the mask as well" if (height, width) == size else ""
        raise DataError(f"{mask} is {width}x{height}, and its image is {size[0]}x{size[1]} (width x height){hint}")
