"""Surveys a folder or a list of images: which task it is for, with which classes and splits."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_plugins.errors import listing, nothing_there
from lora_plugins.tasks.autoconfig.folders import beside, has_folders, splits_in
from lora_plugins.tasks.autoconfig.found import LABELS, MASKS, Flags, Survey, common_size, shared, unmeasured
from lora_plugins.tasks.autoconfig.hub_survey import hub_name, hub_survey
from lora_plugins.tasks.autoconfig.lookalikes import (
    IMAGES_FOLDER,
    MASKS_FOLDER,
    check_are_classes,
    check_has_classes,
    images_elsewhere,
    images_of_list_elsewhere,
    list_in,
    without_masks,
)
from lora_plugins.tasks.autoconfig.mask_coding import mask_coding
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    READERS,
    TRAIN,
    VAL,
    check_folder,
    decoding,
    image_files,
    left_out,
    open_image,
    paired,
    read_errors,
    read_list,
    read_text,
    row_split,
    subfolders,
    without_images,
)

NAMES_FILE = "classes.txt"

ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})

OF_ADDRESSES = re.compile(r"\w{2,}:/")
"""Begins an address; a path of Windows has one letter there."""

ORIENTATION, UPRIGHT = 0x0112, 1
"""Where EXIF says how an image is turned, and the value by which it is not."""


def survey(data: Path | str, flags: Flags) -> Survey:
    """Surveys the training data; reads masks, and the headers of images.

    Args:
        data: A folder with a folder of images for each class, one with images and masks, a list (CSV, JSON lines), or a
            data set of `datasets`.
        flags: What is known already.

    Raises:
        DataError: If it cannot be trained on, with the reason, and what to do.
    """
    name = hub_name(str(data))
    if name is not None:
        return hub_survey(name, flags)
    data = Path(data)
    if OF_ADDRESSES.match(str(data)):
        raise DataError(f"{data} is an address. Download what is there, and give the folder.")
    if data.suffix.lower() in ARCHIVES and data.is_file():
        raise DataError(f"{data} is an archive. Unpack it, and give the folder.")
    if data.suffix.lower() in IMAGE_SUFFIXES and data.is_file():
        raise DataError(f"{data} is one image. Give a folder, with a folder of images for each class.")
    if data.is_file():
        return _of_list(data, flags)
    if data.suffix in READERS and not data.exists():
        raise DataError(f"There is no list {data}: {nothing_there(data)}")
    check_folder(data)
    if flags.masks is not None or (data / MASKS_FOLDER).is_dir():
        return _of_mask_folders(data, flags)
    if (data / IMAGES_FOLDER).is_dir():
        raise without_masks(data)
    return _of_class_folders(data, flags)


def _of_class_folders(data: Path, flags: Flags) -> Survey:
    if flags.classes is not None or flags.ignore_index is not None:
        raise DataError(
            f"--classes and --ignore-index are for masks; the classes of {data} are the names of its folders."
        )
    if not has_folders(data):
        what = "images, and nothing says what is on them" if image_files(data) else "no images and no folder"
        raise DataError(
            f"{data} holds {what}. Make a folder of images for each class, {data}/CLASS/NAME.jpg; or put masks beside "
            f"the images, {data}/{IMAGES_FOLDER}/NAME.jpg and {data}/{MASKS_FOLDER}/NAME.png (or --masks DIR)."
            f"{list_in(data)}"
        )
    splits = splits_in(data)
    folders = {split: data / split for split in splits} or {TRAIN: data}
    if splits and not has_folders(folders[TRAIN]) and image_files(folders[TRAIN]):
        raise DataError(
            f"{folders[TRAIN]} is taken for the train split, and holds images, no folder for each class. If {TRAIN!r} "
            f"is a class, give its folder another name.{list_in(data) or list_in(folders[TRAIN])}"
        )
    for split in splits[1:]:
        check_has_classes(data, split)
    classes = subfolders(folders[TRAIN])
    check_are_classes(data, folders[TRAIN], classes, TRAIN if splits else "")
    problems: list[str] = []
    images: dict[str, dict[str, list[Path]]] = {}
    for split, folder in folders.items():
        images[split] = {name: image_files(folder / name) for name in subfolders(folder)}
        problems += [without_images(folder / name) for name, paths in images[split].items() if not paths]
        problems += [f"{folder / name} is no class of {folders[TRAIN]}" for name in images[split].keys() - {*classes}]
    paths = [path for members in images.values() for found in members.values() for path in found]
    _refuse([*problems, *_unreadable(paths)])
    if len(classes) < 2:
        raise DataError(
            f"{folders[TRAIN]} holds one class, {classes[0]!r}, and there is nothing to tell apart. Make a folder of "
            f"images for each class, at least two.{list_in(data)}"
        )
    sizes = {split: {name: len(paths) for name, paths in members.items()} for split, members in images.items()}
    share, counts = shared(
        {split: sum(members.values()) for split, members in sizes.items()}, [*sizes[TRAIN].values()], flags
    )
    return Survey(
        LABELS,
        "ImageFolderDataModule",
        {"root": str(data.absolute()), **share},
        tuple(classes),
        counts,
        "a folder for each class",
        left_out=[
            *(beside(data, splits) if splits else ()),
            *(path for folder in folders.values() for path in image_files(folder)),
            *left_out(folder / name for folder in folders.values() for name in subfolders(folder)),
        ],
        unmeasured=unmeasured(sizes[TRAIN], sizes.get(VAL), share.get("val_share", 0.0)),
    )


def _of_mask_folders(data: Path, flags: Flags) -> Survey:
    masks_folder = check_folder(flags.masks or data / MASKS_FOLDER)
    nested = (data / IMAGES_FOLDER).is_dir()
    images_folder = data / IMAGES_FOLDER if nested else data
    splits = splits_in(images_folder)
    if not nested and not splits and not image_files(data):
        raise images_elsewhere(data, masks_folder)
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    problems: list[str] = []
    for split in splits or [TRAIN]:
        inside = split if splits else ""
        pairs[split] = _pairs(images_folder / inside, masks_folder / inside, problems)
    _refuse(problems)
    flat = [pair for members in pairs.values() for pair in members]
    _refuse(_unreadable([image for image, _ in flat]))
    _refuse(_unequal(flat))
    coding = mask_coding([mask for _, mask in flat], flags.classes or _names(data), flags.ignore_index)
    found = {split: len(members) for split, members in pairs.items()}
    share, counts = shared(found, [found[TRAIN]], flags)
    unread = left_out(images_folder / split for split in splits or [""]) if nested else []
    folders = {"images": IMAGES_FOLDER if nested else ".", "masks": str(masks_folder.absolute())}
    return Survey(
        MASKS,
        "MaskFolderDataModule",
        {
            "root": str(data.absolute()),
            **({} if nested and flags.masks is None else folders),
            **coding.arguments(),
            **share,
        },
        coding.classes,
        counts,
        f"images with masks in {masks_folder}",
        common_size([_image_size(image) for image, _ in flat]),
        coding,
        [*(beside(images_folder, splits) if nested and splits else ()), *unread],
    )


def _of_list(data: Path, flags: Flags) -> Survey:
    if flags.masks is not None:
        raise DataError(f"--masks is a folder; the masks of {data} are in its column 'mask'.")
    rows = read_list(data, ("image",))
    columns = [name for name in ("mask", "label") if any(row.get(name) not in (None, "") for row in rows)]
    if not columns:
        raise DataError(
            f"{data} has the columns {listing(rows[0])}. It needs one called 'label', or one called 'mask'."
        )
    column = columns[0]
    rows = read_list(data, ("image", column))
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows, 1):
        splits.setdefault(row_split(row, "split", f"Row {number} of {data}"), []).append(row)
    if TRAIN not in splits:
        raise DataError(f"No row of {data} is of the split {TRAIN!r}.")
    images = [data.parent / str(row["image"]) for row in rows]
    if not any(path.exists() for path in images):
        raise images_of_list_elsewhere(data, str(rows[0]["image"]))
    _refuse(_unreadable(images))
    unread = sorted({name for row in rows for name in row if name} - {"image", column, "split"})
    found = f"a list of {column}s{f', without its {listing(unread)}' if unread else ''}"
    counts = {split: len(members) for split, members in splits.items()}
    arguments: dict[str, Any] = {"file": str(data.absolute())}
    if column == "mask":
        masks = [data.parent / str(row["mask"]) for row in rows]
        _refuse(_unequal([*zip(images, masks, strict=True)]))
        coding = mask_coding(masks, flags.classes or _names(data.parent), flags.ignore_index)
        share, counts = shared(counts, [counts[TRAIN]], flags)
        arguments |= {**coding.arguments(), **share}
        size = common_size([_image_size(image) for image in images])
        return Survey(MASKS, "MaskListDataModule", arguments, coding.classes, counts, found, size, coding)
    if flags.ignore_index is not None:
        raise DataError(f"--ignore-index is for masks; {data} has labels.")
    labels = {split: Counter(str(row[column]) for row in members) for split, members in splits.items()}
    classes = flags.classes or tuple(sorted({str(row[column]) for row in rows}))
    if len(classes) < 2:
        raise DataError(f"All rows of {data} have the label {classes[0]!r}, and there is nothing to tell apart.")
    train = {name: labels[TRAIN][name] for name in classes}
    share, counts = shared(counts, [*train.values()], flags)
    chosen = {} if flags.classes is None else {"classes": [*classes]}
    return Survey(
        LABELS,
        "ImageListDataModule",
        {**arguments, **chosen, **share},
        classes,
        counts,
        found,
        unmeasured=unmeasured(train, labels.get(VAL), share.get("val_share", 0.0)),
    )


def _pairs(images: Path, masks: Path, problems: list[str]) -> list[tuple[Path, Path]]:
    each: list[str] = []
    pairs = paired(images, masks, each)
    problems += each if pairs else _common_cause(images, masks) or each
    return pairs


def _common_cause(images: Path, masks: Path) -> list[str]:
    """Says why no image has a mask, where one reason holds for all of them."""
    pictures = {path.stem: path for path in image_files(images)}
    found = {path.stem: path for path in image_files(masks, MASK_SUFFIXES)}
    if not found and image_files(masks):
        return [f"the masks in {masks} are no PNG files, and other formats lose what a mask says"]
    if pictures and found and not pictures.keys() & found.keys():
        image, mask = next(iter(pictures.values())), next(iter(found.values()))
        return [
            f"no mask in {masks} has the name of an image in {images}: {image.name} needs {image.stem}.png, and there "
            f"is {mask.name}. Rename the masks, or write a list, .csv, with the columns image and mask"
        ]
    return []


def _names(folder: Path) -> tuple[str, ...] | None:
    """The names of classes in a file beside the data, one a line."""
    path = folder / NAMES_FILE
    if not path.is_file():
        return None
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{path} names {listing(twice)} more than once. Each class has a name of its own.")
    return tuple(names)


def _unreadable(paths: Sequence[Path]) -> list[str]:
    return [error for error in read_errors(paths, _image_size) if error]


def _unequal(pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """The masks that cannot be read, or differ in size from their images, which are rotated as their files say."""
    return [error for error in read_errors(pairs, _check_sizes) if error]


def _check_sizes(pair: tuple[Path, Path]) -> None:
    image, mask = pair
    width, height = _image_size(mask)
    with decoding(image), Image.open(image) as opened:
        size, is_turned = opened.size, opened.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT
    if is_turned:  # which of the two sizes the header of a turned file has depends on its format
        size = open_image(image).size
    if (width, height) != size:
        raise DataError(f"{mask} is {width}x{height}, and its image is {size[0]}x{size[1]} (width x height)")


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header of a file."""
    with decoding(path), Image.open(path) as image:
        return image.size


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise DataError(
            f"The data cannot be used ({len(problems)} problem{'s' * (len(problems) > 1)}):\n{listed(problems)}"
        )
