"""Semantic segmentation: the task, its metrics, its data modules, and masks drawn in colors.

A data module for each place that images with masks come from: folders, lists, data sets of Hugging Face.
"""

from lora_plugins.tasks.segmentation.colors import class_colors, colored, overlay, palette_picture
from lora_plugins.tasks.segmentation.from_folder import MaskFolderDataModule
from lora_plugins.tasks.segmentation.from_hub import HubMaskDataModule
from lora_plugins.tasks.segmentation.from_list import MaskListDataModule
from lora_plugins.tasks.segmentation.mask_decoder import MaskCode
from lora_plugins.tasks.segmentation.task import SemanticSegmentationTask

__all__ = [
    "HubMaskDataModule",
    "MaskCode",
    "MaskFolderDataModule",
    "MaskListDataModule",
    "SemanticSegmentationTask",
    "class_colors",
    "colored",
    "overlay",
    "palette_picture",
]
