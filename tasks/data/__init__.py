"""Data: from files, lists and data sets of Hugging Face to batches of images with their labels or masks.

Data modules for labels are in `classification`, those for masks in `segmentation`; what both share is here.
"""

from lora_plugins.tasks.data.hub_dataset import HubTable
from lora_plugins.tasks.data.image_io import (
    MASK_SUFFIXES,
    existing_folder,
    image_files,
    open_picture,
    read_image,
    subfolders,
    why_unreadable,
)
from lora_plugins.tasks.data.image_module import ERROR, PROBLEMS, SKIP, Item, PictureDataModule
from lora_plugins.tasks.data.tables import read_table, split_of
from lora_plugins.tasks.data.transforms import AUGMENTATIONS, IMAGES_ONLY, INTERPOLATIONS, Size, image_transform
from lora_plugins.tasks.data.vision_module import (
    BALANCED,
    TEST,
    TRAIN,
    VAL,
    Batch,
    TensorSamples,
    VisionDataModule,
    check_targets,
)

__all__ = [
    "AUGMENTATIONS",
    "BALANCED",
    "ERROR",
    "IMAGES_ONLY",
    "INTERPOLATIONS",
    "MASK_SUFFIXES",
    "PROBLEMS",
    "SKIP",
    "TEST",
    "TRAIN",
    "VAL",
    "Batch",
    "HubTable",
    "Item",
    "PictureDataModule",
    "Size",
    "TensorSamples",
    "VisionDataModule",
    "check_targets",
    "existing_folder",
    "image_files",
    "image_transform",
    "open_picture",
    "read_image",
    "read_table",
    "split_of",
    "subfolders",
    "why_unreadable",
]
