"""Semantic segmentation: the task, its metrics, its data modules, and masks drawn in colors.

There is a data module for each source of images with masks: folders, lists, data sets of Hugging Face.
"""

from lora_plugins.tasks.segmentation.colors import (
    IGNORED,
    MAX_CLASSES,
    Mask,
    Pixels,
    class_colors,
    colorize,
    overlay,
    palette_image,
)
from lora_plugins.tasks.segmentation.from_folder import MaskFolderDataModule
from lora_plugins.tasks.segmentation.from_hub import HubMaskDataModule
from lora_plugins.tasks.segmentation.from_list import MaskListDataModule
from lora_plugins.tasks.segmentation.mask_decoder import MaskDecoder
from lora_plugins.tasks.segmentation.task import SemanticSegmentationTask

__all__ = [
    "IGNORED",
    "MAX_CLASSES",
    "HubMaskDataModule",
    "Mask",
    "MaskDecoder",
    "MaskFolderDataModule",
    "MaskListDataModule",
    "Pixels",
    "SemanticSegmentationTask",
    "class_colors",
    "colorize",
    "overlay",
    "palette_image",
]
