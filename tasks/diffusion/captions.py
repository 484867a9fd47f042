"""Pictures with prompts: one prompt for all of a folder, a `.txt` beside each picture, or a list."""

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins.errors import counted, listing
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import (
    image_files,
    left_out,
    read_all,
    read_image,
    read_list,
    read_text,
    without_images,
)

CAPTION_SUFFIX = ".txt"
IMAGE, PROMPT = "image", "prompt"
"""The columns of a list."""

RAW_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"})
"""Those of photos as cameras store them, most of which `mimetypes` does not know."""


@dataclass(frozen=True)
class Captioned:
    """The path of a picture, its prompt, and its height and width."""

    path: Path
    prompt: str
    size: tuple[int, int]


def captioned_folder(folder: Path, prompt: str | None) -> list[Captioned]:
    """The pictures of a folder, with one prompt for all, or each with what a `.txt` beside it says.

    Raises:
        DataError: If there is no folder or no picture, one or its caption cannot be read, a caption is missing or
            empty, or there are captions beside a prompt for all.
    """
    paths = image_files(folder)
    if not paths:
        raise DataError(f"{without_images(folder.absolute())}.")
    stems = {path.stem for path in paths}  # cameras write a raw photo beside the JPEG of it
    pictures = [each for each in left_out([folder]) if each.is_file() and _is_picture(each)]
    others = [each.name for each in pictures if each.stem not in stems]
    if others:
        rank_zero_warn(
            f"{folder.absolute()} has pictures in formats that are not read, and they are left out: "
            f"{listing(others, 3)}. Convert them to PNG or JPEG."
        )
    captions = [path.with_suffix(CAPTION_SUFFIX) for path in paths]
    if prompt is None:
        return _checked([(path, _caption(caption)) for path, caption in zip(paths, captions, strict=True)], str(folder))
    beside = [caption.name for caption in captions if caption.is_file()]
    if beside:
        raise DataError(
            f"{folder.absolute()} has captions beside its pictures ({', '.join(beside[:3])}), and there is one prompt "
            f"for all, {prompt!r}. Leave out `prompt`, or remove the captions."
        )
    return _checked([(path, prompt) for path in paths], str(folder))


def captioned_list(path: Path, root: Path) -> list[Captioned]:
    """The pictures of a list, `.csv` or `.jsonl`, with the columns `image`, relative to a folder, and `prompt`.

    Raises:
        DataError: If the list or a picture cannot be read, or a prompt is empty.
    """
    rows = read_list(path, [IMAGE, PROMPT])
    return _checked([(root / str(row[IMAGE]), str(row[PROMPT])) for row in rows], str(path))


def _is_picture(path: Path) -> bool:
    kind, _ = mimetypes.guess_type(path.name, strict=False)
    return path.suffix.lower() in RAW_SUFFIXES or (kind is not None and kind.startswith("image/"))


def _caption(path: Path) -> str | DataError | None:
    """Returns a caption, or what is wrong with its file; None if there is none."""
    try:
        return read_text(path) if path.is_file() else None
    except DataError as error:
        return error


def _checked(pairs: Sequence[tuple[Path, str | DataError | None]], where: str) -> list[Captioned]:
    """Reads every picture once, so that errors show before anything is trained."""
    found = [*read_all([path for path, _ in pairs], lambda path: read_image(path).size)]
    problems = [str(each) for each in found if isinstance(each, DataError)]
    for path, prompt in pairs:
        caption = path.with_suffix(CAPTION_SUFFIX)
        if isinstance(prompt, DataError):
            problems.append(str(prompt))
        elif prompt is None:
            problems.append(f"{path} has no caption: there is no {caption.name} beside it, and no `prompt`.")
        elif not prompt.strip():
            problems.append(f"The prompt of {path} is empty.")
    if problems:
        raise DataError(f"{counted(len(problems), 'problem')} with the pictures of {where}:\n{listed(problems)}")
    sizes = [(each[1], each[0]) for each in found if not isinstance(each, DataError)]
    return [Captioned(path, str(prompt).strip(), size) for (path, prompt), size in zip(pairs, sizes, strict=True)]
