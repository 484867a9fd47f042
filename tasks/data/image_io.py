"""Finding and reading pictures on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_plugins.tasks.errors import DataError, unknown

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
MASK_SUFFIXES = frozenset({".png"})
READERS = 4

Thing = TypeVar("Thing")


def existing_folder(folder: Path) -> Path:
    """The folder, if it is there.

    Raises:
        DataError: Where it is not, naming the folders beside it.
    """
    if folder.is_dir():
        return folder
    there = folder.parent
    while not there.is_dir():
        there = there.parent
    beside = [path.name for path in there.iterdir() if path.is_dir()]
    wanted = folder.relative_to(there).parts[0]
    hint = unknown("folder", wanted, beside) if beside else f"{there} holds no folder."
    raise DataError(f"There is no folder {folder.absolute()}. In {there.absolute()}: {hint}")


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out.

    Raises:
        DataError: Where the folder is missing, or holds no folder.
    """
    names = sorted(p.name for p in existing_folder(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder.absolute()} holds no folder; one a class is expected.")
    return names


def image_files(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The pictures in a folder, sorted; hidden files are left out.

    Raises:
        DataError: Where the folder is missing.
    """
    files = existing_folder(folder).iterdir()
    return sorted(p for p in files if p.suffix.lower() in suffixes and not p.name.startswith("."))


def read_image(path: Path) -> Image.Image:
    """Read a picture in color.

    Raises:
        DataError: Where it cannot be read, naming the file.
    """
    return open_picture(path).convert("RGB")


def open_picture(path: Path) -> Image.Image:
    """Read a picture in the mode in which it is stored.

    Raises:
        DataError: Where it cannot be read.
    """
    return decoded(path, str(path))


def decoded(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode a picture, turned upright as its EXIF data say: cameras store what the sensor saw, and how it was held.

    Raises:
        DataError: Where it cannot be decoded, naming it.
    """
    try:
        with Image.open(source) as picture:
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def why_unreadable(things: Sequence[Thing], read: Callable[[Thing], object]) -> list[str | None]:
    """Read all things, several at a time, and say of each why it cannot be read; None where it can."""

    def problem(thing: Thing) -> str | None:
        try:
            read(thing)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(problem, things))
