"""Whether images and masks can be read, before anything is trained on them."""

from collections.abc import Sequence
from pathlib import Path

from lora_plugins.tasks.errors import DataError, counted, listed
from lora_plugins.tasks.files import read_errors, shown_size


def unreadable(paths: Sequence[Path]) -> list[str]:
    """The images that cannot be read, each with the reason, as their headers tell."""
    return [error for error in read_errors(paths, shown_size) if error]


def equal_sizes(pairs: Sequence[tuple[Path, Path]]) -> list[tuple[int, int]]:
    """Width and height of images, which are rotated as their files say, and of their masks; reads headers once.

    Raises:
        DataError: With all that cannot be read, and all masks that differ in size from their images.
    """
    sizes: dict[tuple[Path, Path], tuple[int, int]] = {}

    def read(pair: tuple[Path, Path]) -> None:
        sizes[pair] = _equal_size(*pair)

    check_no_problems([error for error in read_errors(pairs, read) if error])
    return [sizes[pair] for pair in pairs]


def check_no_problems(problems: Sequence[str]) -> None:
    """Raises one error that lists all problems of the data, if there are some."""
    if problems:
        raise DataError(f"The data cannot be used ({counted(len(problems), 'problem')}):\n{listed(problems)}")


def _equal_size(image: Path, mask: Path) -> tuple[int, int]:
    size, (width, height) = shown_size(image), shown_size(mask)
    if (width, height) != size:
        hint = ": if its EXIF turns the image upright, turn the mask as well" if (height, width) == size else ""
        raise DataError(f"{mask} is {width}x{height}, and its image is {size[0]}x{size[1]} (width x height){hint}")
    return size
