"""Surveys a folder or a list of images: which task it is for, with which classes and splits."""

import re
from pathlib import Path

from lora_plugins.errors import nothing_there
from lora_plugins.tasks.autoconfig.class_survey import class_survey
from lora_plugins.tasks.autoconfig.found import Flags, Survey
from lora_plugins.tasks.autoconfig.hub_survey import hub_name, hub_survey
from lora_plugins.tasks.autoconfig.list_survey import list_survey
from lora_plugins.tasks.autoconfig.lookalikes import IMAGES_FOLDER, MASKS_FOLDER, without_masks
from lora_plugins.tasks.autoconfig.mask_survey import mask_survey
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import IMAGE_SUFFIXES, READERS, check_folder

ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})

OF_ADDRESSES = re.compile(r"\w{2,}:/")
"""Begins an address; a path of Windows has one letter there."""


def survey(data: Path | str, flags: Flags) -> Survey:
    """Surveys the training data; reads masks, and the headers of images.

    They are a folder with a folder of images for each class, one with images and masks, a list (CSV, JSON lines), or a
    data set of `datasets`.

    Raises:
        DataError: If it cannot be trained on, with the reason, and what to do.
    """
    name = hub_name(str(data))
    if name is not None:
        return hub_survey(name, flags)
    if OF_ADDRESSES.match(str(data)):
        raise DataError(f"{data} is an address. Download what is there, and give the folder.")
    data = Path(data)
    if data.suffix.lower() in ARCHIVES and data.is_file():
        raise DataError(f"{data} is an archive. Unpack it, and give the folder.")
    if data.suffix.lower() in IMAGE_SUFFIXES and data.is_file():
        raise DataError(f"{data} is one image. Give a folder, with a folder of images for each class.")
    if data.is_file():
        return list_survey(data, flags)
    if data.suffix in READERS and not data.exists():
        raise DataError(f"There is no list {data}: {nothing_there(data)}")
    check_folder(data)
    if flags.masks is not None or (data / MASKS_FOLDER).is_dir():
        return mask_survey(data, flags)
    if (data / IMAGES_FOLDER).is_dir():
        raise without_masks(data)
    return class_survey(data, flags)
