"""Image classification: the task, its metrics, and its data modules.

There is a data module for each source of labeled images: folders, lists, data sets of Hugging Face.
"""

from lora_plugins.tasks.classification.from_folder import ImageFolderDataModule
from lora_plugins.tasks.classification.from_hub import HubImageDataModule
from lora_plugins.tasks.classification.from_list import ImageListDataModule
from lora_plugins.tasks.classification.task import ImageClassificationTask

__all__ = ["HubImageDataModule", "ImageClassificationTask", "ImageFolderDataModule", "ImageListDataModule"]
