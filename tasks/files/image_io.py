"""Reads and encodes image files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image, UnidentifiedImageError

from lora_plugins.tasks.errors import DataError

OPEN_MODES = frozenset({"I", "F"})
"""Of images whose values end nowhere."""

ORIENTATION = 0x0112
"""Where EXIF says how an image is turned."""

TO_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation."""

SIDEWAYS = frozenset(TO_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
"""What exchanges width and height."""

READER_THREADS = 4

ROOM = 2
"""How many times longer than the sides of what it is resized to those of a decoded image are left: crops need it."""

Source = TypeVar("Source")
Found = TypeVar("Found")


def read_image(path: Path, resized_to: Sequence[int] | None = None) -> Image.Image:
    """Reads an image file as RGB; `resized_to` is as in `decode_image`.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    return as_rgb(open_image(path, resized_to), path)


def as_rgb(image: Image.Image, name: object) -> Image.Image:
    """Converts an image to RGB. Of 16 bits, the upper 8 are taken; Pillow by itself makes white of all above 255.

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
    """Reads an image file in the mode in which it is stored; `resized_to` is as in `decode_image`.

    Raises:
        DataError: If it cannot be read, with its path.
    """
    _check_regular(path)
    return decode_image(path, str(path), resized_to)


def decode_image(source: str | Path | IO[bytes], name: str, resized_to: Sequence[int] | None) -> Image.Image:
    """Decodes an image and rotates it as its EXIF orientation says, whatever else is wrong in its EXIF.

    A JPEG that is much larger than `resized_to`, height and width that it or a crop of it gets then, is decoded at a
    half, a quarter or an eighth of its size, in a third of the time; both sides stay `ROOM` times as long as they will
    be, or longer.

    Raises:
        DataError: If it cannot be decoded.
    """
    with _decoding(name), Image.open(source) as image:
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
    with _decoding(path), Image.open(path) as image:
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
def _decoding(name: object) -> Iterator[None]:
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
            return DataError(str(error))  # its own traceback would keep the images of its frames in memory

    with ThreadPoolExecutor(READER_THREADS) as threads:
        yield from threads.map(attempt, sources)
