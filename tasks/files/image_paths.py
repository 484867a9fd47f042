"""The images that a user names: files, folders of images, and patterns of paths."""

import glob
import itertools
from collections.abc import Sequence
from pathlib import Path

from lora_plugins.errors import nothing_there
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files.image_folders import IMAGE_SUFFIXES, NO_IMAGE, image_files, named_by_text


def named_images(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Finds images, of which paths, folders and patterns are given; none is read.

    Returns:
        Their paths, each once.

    Raises:
        DataError: If there is nothing of a name, or no image.
    """
    named = [images] if isinstance(images, str | Path) else images
    return [*dict.fromkeys(path for each in named for path in _found(str(each)))]


def absolute(path: Path) -> Path:
    """The path without `..`, which would lead out of the folder of results; which folder that is, links say."""
    return path.parent.resolve() / path.name if ".." in path.parts else path.absolute()


def _found(images: str) -> list[Path]:
    """The images that an argument names."""
    if not images:  # which a path takes for the current folder
        raise DataError("A name of images is empty, perhaps from a shell variable that is not set.")
    path = Path(images)
    is_pattern = glob.has_magic(images) and not path.exists()  # the name of a folder may have brackets
    if not is_pattern and not path.exists():
        raise DataError(f"There is no file or folder {path}: {nothing_there(path)}")
    paths = _matching(images) if is_pattern else [path] if path.is_file() else image_files(path)
    if not paths:
        raise DataError(f"{path.absolute()} {'matches' if is_pattern else 'holds'} {NO_IMAGE}.{_below(path)}")
    return named_by_text(paths)


def _below(folder: Path) -> str:
    """Suggests a pattern for the images in the subfolders of a folder."""
    pattern = str(Path(glob.escape(str(folder))) / "**" / "*")
    count = len(_matching(pattern)) if folder.is_dir() else 0
    return f" In the folders below there {'is' if count == 1 else 'are'} {count}: {pattern!r}." if count else ""


def _matching(pattern: str) -> list[Path]:
    found = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
    paths = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    start = absolute(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)))
    loops = {folder for folder in {path.parent for path in paths} if _is_within_itself(folder, start)}
    return [path for path in paths if path.parent not in loops]


def _is_within_itself(folder: Path, start: Path) -> bool:
    """Whether a link between two folders leads back to where the way has been, as often as a pattern follows it."""
    place = absolute(folder)
    way = [each.resolve() for each in (place, *place.parents) if each.is_relative_to(start)]
    return len({*way}) < len(way)
