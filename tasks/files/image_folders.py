"""Images in folders: which files are images, which mask belongs to which, and what is not read."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lora_plugins.errors import listing, no_folder
from lora_plugins.tasks.errors import DataError, listed

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
MASK_SUFFIXES = frozenset({".png"})
NO_IMAGE = f"no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
"""What a folder holds of which nothing can be read, for messages."""

OF_ARCHIVES = "__MACOSX"
"""What archives of macOS hold beside the files: a copy of each folder, of hidden files."""


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


def one_left_out(paths: Sequence[Path]) -> str:
    """Names one of the files that are not read, of their most frequent kind, and says what it is."""
    kinds = Counter(path.suffix.lower() for path in paths)
    path = max(paths, key=lambda path: kinds[path.suffix.lower()])
    if path.is_dir():
        return f"{path}, which is a folder"
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    return f"{path}, which {'lies beside the folders' if is_image else 'is no image file here'}"


def without_images(folder: Path) -> str:
    """Says that a folder holds no image, and where below it there is one, or what else it holds."""
    below = next((path.parent for path in images_below(folder)), None)
    if below is not None:
        return f"{folder} holds {NO_IMAGE}; {below} does: move them up"
    others = [path.name for path in left_out([folder])]
    return f"{folder} holds {NO_IMAGE}{f', but {listing(others, 2)}' if others else ''}"


def paired(images: Path, masks: Path, problems: list[str]) -> list[tuple[Path, Path]]:
    """Pairs images with the masks, PNG files, of the same names; adds to `problems` what cannot be paired, and why.

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
