"""Data: from files, lists and data sets of Hugging Face to batches of images with their labels or masks.

Data modules for labels are in `classification`, those for masks in `segmentation`; what both share is here.
"""

from lora_plugins.tasks.data.batch import Batch, check_targets
from lora_plugins.tasks.data.hub_dataset import HUB_CHECKS, HubDataset
from lora_plugins.tasks.data.image_module import ERROR, PROBLEM_POLICIES, SKIP, ImageDataModule
from lora_plugins.tasks.data.samples import Item, TensorSamples
from lora_plugins.tasks.data.transforms import AUGMENTATIONS, IMAGES_ONLY, INTERPOLATIONS, Size, image_transform
from lora_plugins.tasks.data.vision_module import BALANCED, VisionDataModule

__all__ = [
    "AUGMENTATIONS",
    "BALANCED",
    "ERROR",
    "HUB_CHECKS",
    "IMAGES_ONLY",
    "INTERPOLATIONS",
    "PROBLEM_POLICIES",
    "SKIP",
    "Batch",
    "HubDataset",
    "ImageDataModule",
    "Item",
    "Size",
    "TensorSamples",
    "VisionDataModule",
    "check_targets",
    "image_transform",
]
