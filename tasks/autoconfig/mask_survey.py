"""Surveys a folder of images and one of masks."""

from pathlib import Path

from lora_plugins.tasks.autoconfig.folders import beside, class_names, splits_in
from lora_plugins.tasks.autoconfig.found import Flags, Source, Survey, masks_survey
from lora_plugins.tasks.autoconfig.lookalikes import IMAGES_FOLDER, MASKS_FOLDER, OF_BOXES, boxes, images_elsewhere
from lora_plugins.tasks.autoconfig.mask_coding import mask_coding
from lora_plugins.tasks.autoconfig.readable import check_no_problems, equal_sizes
from lora_plugins.tasks.files import MASK_SUFFIXES, TRAIN, check_folder, image_files, left_out, paired


def mask_survey(data: Path, flags: Flags) -> Survey:
    """Surveys images and their masks, in folders of splits or not; reads the masks, and the headers of images.

    Raises:
        DataError: If they cannot be trained on, with the reason, and what to do.
    """
    masks_folder = check_folder(flags.masks or data / MASKS_FOLDER)
    nested = (data / IMAGES_FOLDER).is_dir()
    images_folder = data / IMAGES_FOLDER if nested else data
    splits = splits_in(images_folder)
    if not nested and not splits and not image_files(data):
        raise images_elsewhere(data, masks_folder)
    inside = {split: split for split in splits} or {TRAIN: ""}
    pairs = _pairs(images_folder, masks_folder, inside)
    flat = [pair for members in pairs.values() for pair in members]
    sizes = equal_sizes(flat)
    coding = mask_coding([mask for _, mask in flat], flags.classes or class_names(data), flags.ignore_index)
    unread = left_out(images_folder / folder for folder in inside.values()) if nested else []
    folders = {"images": IMAGES_FOLDER if nested else ".", "masks": str(masks_folder.absolute())}
    source = Source(
        "MaskFolderDataModule",
        {"root": str(data.absolute()), **({} if nested and flags.masks is None else folders)},
        f"images with masks in {masks_folder}",
        [*(beside(images_folder, splits) if nested and splits else ()), *unread],
    )
    return masks_survey(source, {split: len(members) for split, members in pairs.items()}, sizes, coding, flags)


def _pairs(images: Path, masks: Path, inside: dict[str, str]) -> dict[str, list[tuple[Path, Path]]]:
    """The images with their masks by split; refuses those that lack one."""
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    problems: list[str] = []
    for split, folder in inside.items():
        unpaired: list[str] = []
        pairs[split] = paired(images / folder, masks / folder, unpaired)
        problems += unpaired if pairs[split] else _common_cause(images / folder, masks / folder) or unpaired
    check_no_problems(problems)
    return pairs


def _common_cause(images: Path, masks: Path) -> list[str]:
    """Says why no image has a mask, where one reason holds for all of them."""
    pictures = {path.stem: path for path in image_files(images)}
    found = {path.stem: path for path in image_files(masks, MASK_SUFFIXES)}
    named_alike = [path for path in left_out([masks]) if path.is_file() and path.stem in pictures]
    if not found and named_alike and all(path.suffix.lower() in OF_BOXES for path in named_alike):
        return [boxes(masks)]
    if not found and (image_files(masks) or named_alike):
        return [f"the masks in {masks} are no PNG files. Convert GIF, TIFF and BMP; JPEG has lost what a mask says"]
    if pictures and found and not pictures.keys() & found.keys():
        image, mask = next(iter(pictures.values())), next(iter(found.values()))
        return [
            f"no mask in {masks} has the name of an image in {images}: {image.name} needs {image.stem}.png, and there "
            f"is {mask.name}. Rename the masks, or write a list, .csv, with the columns image and mask"
        ]
    return []
