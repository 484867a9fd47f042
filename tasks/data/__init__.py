"""Data: from files, lists and data sets of Hugging Face to batches of images with their labels or masks.

Data modules for labels are in `classification`, those for masks in `segmentation`; what both share is here.
"""

from lora_plugins.tasks.data.batch import Batch, check_targets
from lora_plugins.tasks.data.hub_dataset import HUB_CHECKS, HubDataset
from lora_plugins.tasks.data.image_module import ERROR, PROBLEM_POLICIES, SKIP, ImageDataModule
from lora_plugins.tasks.data.samples import Item, TensorSamples
from lora_plugins.tasks.data.transforms import AUGMENTATIONS, IMAGES_ONLY, INTERPOLATIONS, Size, image_transform
from lora_plugins.tasks.data.vision_module import BALANCED, VisionDataModule
from lora_plugins.tasks.files import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    NO_IMAGE,
    TEST,
    TRAIN,
    VAL,
    as_png,
    as_rgb,
    check_folder,
    image_files,
    named_by_text,
    open_image,
    paired,
    path_key,
    read_errors,
    read_image,
    read_list,
    row_split,
    subfolders,
    without_images,
)

__all__ = [
    "AUGMENTATIONS",
    "BALANCED",
    "ERROR",
    "HUB_CHECKS",
    "IMAGES_ONLY",
    "IMAGE_SUFFIXES",
    "INTERPOLATIONS",
    "MASK_SUFFIXES",
    "NO_IMAGE",
    "PROBLEM_POLICIES",
    "SKIP",
    "TEST",
    "TRAIN",
    "VAL",
    "Batch",
    "HubDataset",
    "ImageDataModule",
    "Item",
    "Size",
    "TensorSamples",
    "VisionDataModule",
    "as_png",
    "as_rgb",
    "check_folder",
    "check_targets",
    "image_files",
    "image_transform",
    "named_by_text",
    "open_image",
    "paired",
    "path_key",
    "read_errors",
    "read_image",
    "read_list",
    "row_split",
    "subfolders",
    "without_images",
]
