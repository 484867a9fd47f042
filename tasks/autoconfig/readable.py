"""Whether images and masks can be read, before anything is trained on them."""

from collections.abc import Sequence
from pathlib import Path

from lora_plugins.errors import counted
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import read_all, shown_size


def unreadable(paths: Sequence[Path]) -> list[str]:
    """The images that cannot be read, each with the reason, as their headers tell."""
    return [str(found) for found in read_all(paths, shown_size) if isinstance(found, DataError)]


def equal_sizes(pairs: Sequence[tuple[Path, Path]]) -> list[tuple[int, int]]:
    """Width and height of images, which are rotated as their files say, and of their masks; reads headers once.

    Raises:
        DataError: With all that cannot be read, and all masks that differ in size from their images.
    """
    found = [*read_all(pairs, _equal_size)]
    check_no_problems([str(each) for each in found if isinstance(each, DataError)])
    return [each for each in found if not isinstance(each, DataError)]


def check_no_problems(problems: Sequence[str]) -> None:
    """Raises one error that lists all problems of the data, if there are some."""
    if problems:
        raise DataError(f"The data cannot be used ({counted(len(problems), 'problem')}):\n{listed(problems)}")


def _equal_size(pair: tuple[Path, Path]) -> tuple[int, int]:
    image, mask = pair
    size, (width, height) = shown_size(image), shown_size(mask)
    if (width, height) != size:
        hint = ": if its EXIF turns the image upright, turn the mask as well" if (height, width) == size else ""
        raise DataError(f"{mask} is {width}x{height}, and its image is {size[0]}x{size[1]} (width x height){hint}")
    return size
