"""Finds, reads and encodes image files."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar

from PIL import Image, UnidentifiedImageError

from lora_plugins.errors import listing, no_folder
from lora_plugins.tasks.errors import DataError, listed

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
MASK_SUFFIXES = frozenset({".png"})
NO_IMAGE = f"no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
"""What a folder holds of which nothing can be read, for messages."""

OF_ARCHIVES = "__MACOSX"
"""What archives of macOS hold beside the files: a copy of each folder, of hidden files."""

OPEN_MODES = frozenset({"I", "F"})
"""Of images whose values end nowhere."""

ORIENTATION = 0x0112
"""Where EXIF says how an image is turned."""

TO_UPRIGHT: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
"""What makes an image upright, by its orientation."""

SIDEWAYS = frozenset(TO_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
"""What exchanges width and height."""

READER_THREADS = 4

ROOM = 2
"""How many times longer than the sides of what it is resized to those of a decoded image are left: crops need it."""

Source = TypeVar("Source")
Found = TypeVar("Found")


def check_folder(folder: Path) -> Path:
    """Checks that a folder exists, and returns it.

    Raises:
        DataError: If it does not, with the folders beside it.
    """
    if not folder.is_dir():
        raise DataError(no_folder(folder))
    return folder


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of the data."""
    return name.startswith(".") or name == OF_ARCHIVES


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones.

    Raises:
        DataError: If the folder is missing, or holds no folder, or one whose name is no text.
    """
    found = [p for p in check_folder(folder).iterdir() if p.is_dir() and not is_hidden(p.name)]
    names = sorted(path.name for path in named_by_text(found))
    if not names:
        raise DataError(f"{folder.absolute()} holds no folder; one a class is expected.")
    return names


def image_files(folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files in a folder, sorted, without hidden ones.

    Raises:
        DataError: If the folder is missing, or the name of a file is no text.
    """
    files = check_folder(folder).iterdir()
    return named_by_text(sorted(p for p in files if p.suffix.lower() in suffixes and not is_hidden(p.name)))


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and in all folders below it, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return (path for path in found if not any(map(is_hidden, path.relative_to(folder).parts)))


def left_out(folders: Iterable[Path]) -> list[Path]:
    """The files in folders of images that are not read."""
    found = (path for folder in folders for path in sorted(folder.iterdir()) if not is_hidden(path.name))
    return [path for path in found if path.is_dir() or path.suffix.lower() not in IMAGE_SUFFIXES]


def why_left_out(path: Path) -> str:
    """Says what something is that is not read."""
    if path.is_dir():
        return "is a folder"
    return "lies beside the folders" if path.suffix.lower() in IMAGE_SUFFIXES else "is no image file here"


def without_images(folder: Path) -> str:
    """Says that a folder holds no image, and where below it there is one, or what else it holds."""
    below = next((path.parent for path in images_below(folder)), None)
    if below is not None:
        return f"{folder} holds {NO_IMAGE}; {below} does: move them up"
    others = [path.name for path in left_out([folder])]
    return f"{folder} holds {NO_IMAGE}{f', but {listing(others, 2)}' if others else ''}"


def paired(images: Path, masks: Path, problems: list[str]) -> list[tuple[Path, Path]]:
    """Pairs the images of a folder with the masks of the same names in another one.

    Args:
        images: The folder of images.
        masks: The folder of masks, PNG files.
        problems: What cannot be paired is added, with the reason.

    Raises:
        DataError: If a folder is missing, or the name of a file is no text.
    """
    pictures, found = image_files(images), image_files(masks, MASK_SUFFIXES)
    if not pictures:
        problems.append(without_images(images))
    repeated: set[str] = set()
    for paths in (pictures, found):
        count = Counter(map(_stem, paths))
        twice = [path for path in paths if count[_stem(path)] > 1]
        problems += [f"{path} is one of several files of one name, so that its mask is ambiguous" for path in twice]
        repeated |= {*map(_stem, twice)}
    by_stem, shown = ({_stem(path): path for path in paths} for paths in (found, pictures))
    problems += [f"{path} has no mask {masks / path.stem}.png" for path in pictures if _stem(path) not in by_stem]
    problems += [f"{path} has no image in {images}" for path in found if _stem(path) not in shown]
    return [(path, by_stem[_stem(path)]) for path in pictures if _stem(path) in by_stem.keys() - repeated]


def _stem(path: Path) -> str:
    """The name of a file without its ending, with accents as a part of their letters; some systems write them apart."""
    return unicodedata.normalize("NFC", path.stem)


def named_by_text(paths: Sequence[Path]) -> list[Path]:
    """Checks that paths are texts, so that they can be printed and written into tables and reports, and returns them.

    Raises:
        DataError: With those that are not, as of archives that were packed with another encoding.
    """
    wrong = [ascii(str(path)) for path in paths if not _is_text(str(path))]
    if wrong and (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise DataError(
            f"Names of files and folders are read as {encoding} here, which is not what these are ({len(wrong)}):\n"
            f"{listed(wrong)}\nSet PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8."
        )
    if wrong:
        raise DataError(f"Names of files and folders have to be UTF-8. Rename ({len(wrong)}):\n{listed(wrong)}")
    return [*paths]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image(path: Path, resized_to: Sequence[int] | None = None) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        path: The file.
        resized_to: As in `decode_image`.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    return as_rgb(open_image(path, resized_to), path)


def as_rgb(image: Image.Image, name: object) -> Image.Image:
    """Converts an image to RGB. Of 16 bits, the upper 8 are taken; Pillow by itself makes white of all above 255.

    Args:
        image: The image.
        name: Its name in error messages.

    Raises:
        DataError: If its values have no range of which white is the end.
    """
    if image.mode.startswith("I;16"):
        import numpy as np

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in OPEN_MODES:
        raise DataError(
            f"{name} holds 32-bit numbers (mode {image.mode}), and nothing says which of them is white. Write it with "
            "8 or 16 bits"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a palette whose colors are more or less transparent
    return image.convert("RGB")


def open_image(path: Path, resized_to: Sequence[int] | None = None) -> Image.Image:
    """Reads an image file in the mode in which it is stored.

    Args:
        path: The file.
        resized_to: As in `decode_image`.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    _check_regular(path)
    return decode_image(path, str(path), resized_to)


def decode_image(source: str | Path | IO[bytes], name: str, resized_to: Sequence[int] | None = None) -> Image.Image:
    """Decodes an image and rotates it as its EXIF orientation says, whatever else is wrong in its EXIF.

    Args:
        source: The encoded image.
        name: Its name in error messages.
        resized_to: Height and width that the image is resized to then, or a crop of it. A JPEG that is much larger is
            decoded at a half, a quarter or an eighth of its size, in a third of the time; both sides stay `ROOM` times
            as long as they will be, or longer. None for its own size.

    Raises:
        DataError: If it cannot be decoded.
    """
    with decoding(name), Image.open(source) as image:
        if resized_to is not None:
            image.draft(None, (ROOM * max(resized_to),) * 2)  # square, as EXIF may turn it
        image.load()
        turn = _turn(image)
        return image if turn is None else image.transpose(turn)


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as it is shown, from its header.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    _check_regular(path)
    with decoding(path), Image.open(path) as image:
        turn, (width, height), is_tiff = _turn(image), image.size, image.format == "TIFF"
    if turn is not None and is_tiff:  # of which Pillow's versions give one size or the other
        return open_image(path).size
    return (height, width) if turn in SIDEWAYS else (width, height)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise DataError(f"{path} cannot be read: it is no regular file")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright; `ImageOps.exif_transpose` writes its EXIF anew, and fails at tags that it reads."""
    return TO_UPRIGHT.get(image.getexif().get(ORIENTATION, 0))


def as_png(image: Image.Image) -> bytes:
    """Encodes an image as a PNG file."""
    stream = BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


@contextmanager
def decoding(name: object) -> Iterator[None]:
    """Names the file whose decoder fails.

    Raises:
        DataError: Whatever the decoder raises: of damaged files, there is hardly an exception that Pillow leaves out.
    """
    try:
        yield
    except Image.DecompressionBombError as error:  # by which Pillow means an attack; it is a scan, or a scene
        raise DataError(f"{name} cannot be read: {error} Scale it down, or cut it into pieces") from error
    except UnidentifiedImageError as error:
        bands = ". Of a TIFF with more than four bands, write three as a picture" if _is_tiff(name) else ""
        raise DataError(f"{name} cannot be read: {error}{bands}") from error
    except Exception as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def _is_tiff(name: object) -> bool:
    return Path(str(name)).suffix.lower() in (".tif", ".tiff")


def read_all(sources: Sequence[Source], read: Callable[[Source], Found]) -> Iterator[Found | DataError]:
    """Reads all sources, in several threads, and yields what `read` finds in each, or why it cannot be used."""

    def attempt(source: Source) -> Found | DataError:
        try:
            return read(source)
        except DataError as error:
            return error

    with ThreadPoolExecutor(READER_THREADS) as threads:
        yield from threads.map(attempt, sources)
