"""Vision tasks of lora_plugins; imported as `lora_plugins.tasks`.

Two tasks, image classification and semantic segmentation, over models of timm, transformers and
segmentation-models-pytorch; data modules for folders on disk and for data that needs no download; and
callbacks that show what a fit has done. The YAML files beside this module put them together.
"""

if __name__ != "lora_plugins.tasks":
    raise ImportError(
        f"This package was imported as {__name__!r}. Import it as 'lora_plugins.tasks': a file that is imported "
        "under two names becomes two modules, with two sets of classes."
    )

from lora_plugins.tasks.before_after import BeforeAfter
from lora_plugins.tasks.classification.digits import DigitsDataModule
from lora_plugins.tasks.classification.folder import ImageFolderDataModule
from lora_plugins.tasks.classification.task import ImageClassificationTask
from lora_plugins.tasks.data import VisionDataModule
from lora_plugins.tasks.errors import DataError, WeightsError
from lora_plugins.tasks.models import ModelConfig
from lora_plugins.tasks.segmentation.folder import MaskFolderDataModule
from lora_plugins.tasks.segmentation.picture import PredictionPicture, draw_predictions
from lora_plugins.tasks.segmentation.scenes import DigitScenesDataModule
from lora_plugins.tasks.segmentation.task import SemanticSegmentationTask
from lora_plugins.tasks.threads import CpuThreads

__all__ = [
    "BeforeAfter",
    "CpuThreads",
    "DataError",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "ImageClassificationTask",
    "ImageFolderDataModule",
    "MaskFolderDataModule",
    "ModelConfig",
    "PredictionPicture",
    "SemanticSegmentationTask",
    "VisionDataModule",
    "WeightsError",
    "draw_predictions",
]
