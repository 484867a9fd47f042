"""Find and read image files."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_plugins.errors import no_folder
from lora_plugins.tasks.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
MASK_SUFFIXES = frozenset({".png"})
READER_THREADS = 4

Source = TypeVar("Source")


def check_folder(folder: Path) -> Path:
    """Check that a folder exists, and return it.

    Raises:
        DataError: If it does not, with the folders beside it.
    """
    if not folder.is_dir():
        raise DataError(no_folder(folder))
    return folder


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones.

    Raises:
        DataError: If the folder is missing, or holds no folder.
    """
    names = sorted(p.name for p in check_folder(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder.absolute()} holds no folder; one a class is expected.")
    return names


def image_files(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files in a folder, sorted, without hidden ones.

    Raises:
        DataError: If the folder is missing.
    """
    files = check_folder(folder).iterdir()
    return sorted(p for p in files if p.suffix.lower() in suffixes and not p.name.startswith("."))


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    return open_image(path).convert("RGB")


def open_image(path: Path) -> Image.Image:
    """Read an image file in the mode in which it is stored.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    return decode_image(path, str(path))


def decode_image(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode an image and rotate it as its EXIF orientation says.

    Args:
        source: The encoded image.
        name: Its name in error messages.

    Raises:
        DataError: If it cannot be decoded.
    """
    try:
        with Image.open(source) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def read_errors(sources: Sequence[Source], read: Callable[[Source], object]) -> list[str | None]:
    """Read all sources, in several threads, and return the error message of each; None if it can be read."""

    def error_of(source: Source) -> str | None:
        try:
            read(source)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(READER_THREADS) as threads:
        return list(threads.map(error_of, sources))
