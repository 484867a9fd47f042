"""Surveys a folder with a folder of images for each class."""

from collections.abc import Mapping
from pathlib import Path

from lora_plugins.tasks.autoconfig.folders import beside, has_folders, splits_in
from lora_plugins.tasks.autoconfig.found import Flags, Source, Survey, labels_survey
from lora_plugins.tasks.autoconfig.lookalikes import (
    IMAGES_FOLDER,
    MASKS_FOLDER,
    check_are_classes,
    check_has_classes,
    labels_in,
)
from lora_plugins.tasks.autoconfig.readable import check_no_problems, unreadable
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import TRAIN, image_files, left_out, subfolders, without_images

Images = Mapping[str, Mapping[str, list[Path]]]
"""By split and class."""


def class_survey(data: Path, flags: Flags) -> Survey:
    """Surveys folders of classes, in folders of splits or not; reads the headers of images.

    Raises:
        DataError: If they cannot be trained on, with the reason, and what to do.
    """
    if flags.classes is not None or flags.ignore_index is not None:
        raise DataError(
            f"--classes and --ignore-index are for masks; the classes of {data} are the names of its folders."
        )
    splits, folders = _split_folders(data)
    classes = subfolders(folders[TRAIN])
    check_are_classes(data, folders[TRAIN], classes, TRAIN if splits else "")
    images = {
        split: {name: image_files(folder / name) for name in subfolders(folder)} for split, folder in folders.items()
    }
    _check_images(folders, images)
    if len(classes) < 2:
        raise DataError(
            f"{folders[TRAIN]} holds one class, {classes[0]!r}, and there is nothing to tell apart. Make a folder of "
            f"images for each class, at least two.{labels_in(data)}"
        )
    unread = [
        *(beside(data, splits) if splits else ()),
        *(path for folder in folders.values() for path in image_files(folder)),
        *left_out(folder / name for folder in folders.values() for name in subfolders(folder)),
    ]
    source = Source("ImageFolderDataModule", {"root": str(data.absolute())}, "a folder for each class", unread)
    labels = {split: {name: len(paths) for name, paths in members.items()} for split, members in images.items()}
    return labels_survey(source, labels, classes, flags)


def _split_folders(data: Path) -> tuple[list[str], dict[str, Path]]:
    """The splits that have folders, and the folder of classes of each; the data itself where there are none."""
    if not has_folders(data):
        what = "images, and nothing says what is on them" if image_files(data) else "no images and no folder"
        raise DataError(
            f"{data} holds {what}. Make a folder of images for each class, {data}/CLASS/NAME.jpg; or put masks beside "
            f"the images, {data}/{IMAGES_FOLDER}/NAME.jpg and {data}/{MASKS_FOLDER}/NAME.png (or --masks DIR)."
            f"{labels_in(data)}"
        )
    splits = splits_in(data)
    folders = {split: data / split for split in splits} or {TRAIN: data}
    if splits and not has_folders(folders[TRAIN]) and image_files(folders[TRAIN]):
        raise DataError(
            f"{folders[TRAIN]} is taken for the train split, and holds images, no folder for each class. If {TRAIN!r} "
            f"is a class, give its folder another name.{labels_in(data) or labels_in(folders[TRAIN])}"
        )
    for split in splits[1:]:
        check_has_classes(data, split)
    return splits, folders


def _check_images(folders: Mapping[str, Path], images: Images) -> None:
    """Refuses classes without images or that are not trained on, and images that cannot be read, all at once."""
    problems: list[str] = []
    for split, folder in folders.items():
        problems += [without_images(folder / name) for name, paths in images[split].items() if not paths]
        problems += [
            f"{folder / name} is no class of {folders[TRAIN]}" for name in images[split].keys() - images[TRAIN]
        ]
    paths = [path for members in images.values() for found in members.values() for path in found]
    check_no_problems([*problems, *unreadable(paths)])
