"""The folders of a data set: what they hold, and which of them are splits."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lora_plugins.errors import listing
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import TEST, TRAIN, VAL, image_files, images_below, is_hidden, read_text

NAMES_FILE = "classes.txt"
"""Names of the classes of masks, one a line, beside the data."""

_BYTE = r"(?:25[0-5]|2[0-4]\d|[01]?\d?\d)"
_COLOR = rf"[(\[]?(#[0-9a-fA-F]{{6}}|{_BYTE}(?:[,;\s]+{_BYTE}){{2}})[)\]]?"
_WITH_COLOR = re.compile(rf"{_COLOR}[:,;\s]+\S.*|\S.*[:,;\s]{_COLOR}[:,;\s]*")
"""A name with a color, as other programs write it: `road #804080`, `128,64,128 road`, `road:128,64,128::`."""
_HEADER = re.compile(r"# .*|.*(?:\br(?:ed)?[,;\s]+g(?:reen)?[,;\s]+b(?:lue)?\b|rgb|colou?r).*", re.IGNORECASE)
"""A line above names with colors that says so, such as `name,r,g,b`."""

OTHER_NAMES = {"valid": VAL, "validation": VAL, "training": TRAIN, "testing": TEST}
SPLIT_NAMES = {TRAIN: TRAIN, VAL: VAL, TEST: TEST, **OTHER_NAMES}


def has_folders(folder: Path) -> bool:
    """Whether there are folders in a folder, hidden ones apart."""
    return any(path.is_dir() and not is_hidden(path.name) for path in folder.iterdir())


def holds_folders_alone(folder: Path) -> bool:
    """Whether there are folders in a folder, and no images beside them."""
    return has_folders(folder) and not image_files(folder)


def holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder or below it."""
    return next(images_below(folder), None) is not None


def beside(folder: Path, read: Iterable[str]) -> list[Path]:
    """What lies beside the folders of classes or splits and is not read: images, and other folders with images."""
    others = (path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path.name))
    return [*image_files(folder), *(path for path in others if path.name not in {*read} and holds_images(path))]


def splits_in(folder: Path) -> list[str]:
    """The folders of splits in a folder; none if its files are to be split.

    Raises:
        DataError: If one has another name, or there are some and none to train on.
    """
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    splits = [name for name in (TRAIN, VAL, TEST) if name in names]
    for other in sorted(names - {*splits}):
        name = SPLIT_NAMES.get(other.lower())
        is_meant = other in OTHER_NAMES and (splits or other != "training")  # else it may be a class
        if name is not None and name not in names and (is_meant or holds_folders_alone(folder / other)):
            raise DataError(f"{folder / other} looks like the {name} split. Call it {folder / name}.")
    if splits and TRAIN not in splits:
        raise DataError(f"{folder} has a folder {splits[0]!r} and none called {TRAIN!r}, which is needed beside it.")
    return splits


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Returns the names of classes that a file beside the data lists; None without such a file.

    Raises:
        DataError: If it lists one twice, or has a color in each line: those are matched with names by their order.
    """
    path = folder / NAMES_FILE
    if not path.is_file():
        return None
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{path} names {listing(twice)} more than once. Each class has a name of its own.")
    below_header = [name for name in names if not _HEADER.fullmatch(name)]
    if below_header and all(map(_WITH_COLOR.fullmatch, below_header)):
        raise DataError(
            f"{path} has colors beside the names, as {below_header[0]!r}. Write names alone, in the order of the "
            "values or colors that is printed without this file, or name them by --classes."
        )
    return tuple(names)
