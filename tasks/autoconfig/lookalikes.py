"""Folders that look like classes or like images with masks, and are something else: what to say of them."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_plugins.errors import listing
from lora_plugins.tasks.autoconfig.folders import SPLIT_NAMES, has_folders, holds_folders_alone, holds_images
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import (
    ANNOTATIONS,
    DRAWN_FIRST,
    IMAGE_SUFFIXES,
    READERS,
    TEST,
    TRAIN,
    VAL,
    image_files,
    subfolders,
)

IMAGES_FOLDER, MASKS_FOLDER = "images", "masks"

OF_IMAGES, OF_MASKS = (
    re.compile(words, re.IGNORECASE) for words in ("image|img", "mask|label|annotation|segment|^gt|ground.?truth")
)
"""What names of folders hold that are no classes."""

JPEG = frozenset({".jpg", ".jpeg"})

OF_BOXES = ANNOTATIONS | {".txt"}
"""Endings of files with boxes and polygons."""


def without_masks(data: Path) -> DataError:
    """Returns what to say of a folder of images with no masks beside it."""
    others = [data / name for name in subfolders(data) if name != IMAGES_FOLDER]
    masks = [folder for folder in others if holds_images(folder)]
    hint = f" Masks in a folder of another name: --masks {masks[0]}." if masks else ""
    if others and not masks:
        hint = f" {boxes(others[0])}"
    are_classes = holds_folders_alone(data / IMAGES_FOLDER) and not SPLIT_NAMES.keys() & {
        *subfolders(data / IMAGES_FOLDER)
    }
    way = f"train on {data / IMAGES_FOLDER}" if are_classes else "make a folder for each class"
    return DataError(
        f"{data / IMAGES_FOLDER} has no masks beside it: there is no {data / MASKS_FOLDER}.{hint} To classify, "
        f"{way}.{labels_in(data)}"
    )


def check_are_classes(data: Path, folder: Path, classes: Sequence[str], split: str) -> None:
    """Refuses folders that are taken for classes and look like something else."""
    if len(classes) == 1 and holds_folders_alone(inner := folder / classes[0]):
        way = "Move these up" if split else f"Train on {inner}"
        raise DataError(f"{folder} holds one folder, {classes[0]!r}, with folders in it. {way}.")
    masks = [name for name in classes if OF_MASKS.search(name)]
    others = [name for name in classes if name not in masks]
    are_paired = len(masks) == len(others) == 1 and _are_paired(folder / others[0], folder / masks[0])
    images = [name for name in others if are_paired or OF_IMAGES.search(name)]
    if images and masks and (len(classes) == 2 or any(not image_files(folder / name) for name in classes)):
        are_drawn = any(holds_images(folder / name) for name in masks)
        hint = "" if are_drawn else f" {boxes(folder / masks[0])}"
        raise DataError(
            f"{folder} holds {listing(classes)}, which look like images with masks, not like classes. "
            f"They are expected in {data / IMAGES_FOLDER / split} and {data / MASKS_FOLDER / split}, with equal names; "
            f"or in a list, .csv or .jsonl, with the columns image and mask.{hint} If they are classes, rename one."
        )
    drawn = next((folder / name for name in masks if _holds_boxes(folder / name)), None)
    if drawn is not None:
        raise DataError(
            f"{folder} holds {listing(classes)}, not all of which are folders of images of a class. {boxes(drawn)} If "
            f"the others are classes, move {drawn.name} out of {folder}."
        )
    if not split and all(holds_folders_alone(folder / name) for name in classes):
        raise DataError(
            f"{folder} holds {listing(classes)}, with folders in them and no images. If they are splits, call them "
            f"{TRAIN}, {VAL} and {TEST}, with the folders of the classes in them; if they are classes, move the images "
            "in them up."
        )


def _are_paired(images: Path, masks: Path) -> bool:
    """Whether masks are files of another format than images, with equal names, or with one ending added to all.

    A JPEG is no mask: it changes the values of pixels.
    """
    pictures, drawn = ({path.stem: path.suffix.lower() for path in image_files(folder)} for folder in (images, masks))
    ending = max(drawn, key=len, default="")[len(max(pictures, key=len, default="")) :]
    are_named = bool(pictures) and {name + ending for name in pictures} == {*drawn}
    return are_named and JPEG.union(pictures.values()).isdisjoint(drawn.values())


def check_has_classes(data: Path, split: str) -> None:
    """Refuses a split that has no folder for each class."""
    if not has_folders(folder := data / split):
        raise DataError(
            f"{folder} is taken for the {split} split, and holds no folder for each class. Images without labels are "
            f"no split: move them out of {data}, and ask lora-plugins predict for their labels.{labels_in(folder)}"
        )


def images_elsewhere(data: Path, masks: Path) -> DataError:
    """Returns what to say of a folder of masks with no images beside it."""
    others = [data / name for name in subfolders(data) if data / name != masks] if has_folders(data) else []
    named = next((f" Those in {folder}: call it so." for folder in others if holds_images(folder)), "")
    return DataError(
        f"{data} holds no images for the masks in {masks}. They are expected in {data / IMAGES_FOLDER}.{named} If the "
        "folders are classes, rename that of the masks."
    )


def images_of_list_elsewhere(data: Path, first: str) -> DataError:
    """Returns what to say of a list of which no image exists; `first` is the first that it names."""
    folder, name = data.parent, re.split(r"[\\/]", first)[-1]
    suffixes = IMAGE_SUFFIXES | {""}
    alike = (path for path in folder.rglob(f"{glob.escape(name)}*") if path.suffix.lower() in suffixes)
    with_slashes = folder / first.replace("\\", "/")
    found = (path for path in (with_slashes, *alike) if path.is_file() and name in (path.name, path.stem))
    there = next(found, None)
    hint = f" For {there}, it is {Path(os.path.relpath(there, folder)).as_posix()!r}." if there else ""
    return DataError(
        f"None of the images in {data} exists; the first is {first!r}. A path counts from the folder of the list, and "
        f"has its ending.{hint}"
    )


def labels_in(data: Path) -> str:
    """Names the lists of images that lie in a folder or, if there is none, a file that may have boxes or polygons."""
    paths = sorted(data.iterdir())
    if lists := [str(path) for path in paths if path.suffix in READERS]:
        return f" To take what a list says of them, train on that: {' or '.join(lists[:3])}."
    drawn = next((path for path in paths if path.suffix.lower() in ANNOTATIONS), None)
    return f" {drawn} is no list: {DRAWN_FIRST}." if drawn else ""


def _holds_boxes(folder: Path) -> bool:
    """Whether a folder holds files with boxes or polygons, and no image."""
    return not image_files(folder) and any(path.suffix.lower() in OF_BOXES for path in folder.iterdir())


def boxes(folder: Path) -> str:
    """Returns what to say of a folder with boxes or polygons."""
    return f"{folder} holds no images: {DRAWN_FIRST}."
