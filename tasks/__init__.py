"""Vision tasks of lora_plugins; imported as `lora_plugins.tasks`.

Two tasks, image classification and semantic segmentation, over models of timm, transformers, torchvision and
segmentation-models-pytorch; data modules for files on disk, for data sets of Hugging Face and for data that needs no
download; and callbacks that show what a fit has done. The YAML files beside this module put them together.

Names are imported when they are first used: the libraries behind them take seconds.
"""

from typing import TYPE_CHECKING

from lora_plugins.utils import lazily

if __name__ != "lora_plugins.tasks":
    raise ImportError(
        f"This package was imported as {__name__!r}. Import it as 'lora_plugins.tasks': a file that is imported "
        "under two names becomes two modules, with two sets of classes."
    )

if TYPE_CHECKING:
    from lora_plugins.tasks.before_after import BeforeAfter
    from lora_plugins.tasks.classification.digits import DigitsDataModule
    from lora_plugins.tasks.classification.folder import ImageFolderDataModule
    from lora_plugins.tasks.classification.hub import HubImageDataModule
    from lora_plugins.tasks.classification.listed import ImageListDataModule
    from lora_plugins.tasks.classification.task import ImageClassificationTask
    from lora_plugins.tasks.data import VisionDataModule
    from lora_plugins.tasks.errors import DataError, WeightsError
    from lora_plugins.tasks.export import export_task
    from lora_plugins.tasks.loading import load_task, merged_task
    from lora_plugins.tasks.models import ModelConfig
    from lora_plugins.tasks.predict import predict_folder
    from lora_plugins.tasks.report import HtmlReport
    from lora_plugins.tasks.segmentation.folder import MaskFolderDataModule
    from lora_plugins.tasks.segmentation.hub import HubMaskDataModule
    from lora_plugins.tasks.segmentation.listed import MaskListDataModule
    from lora_plugins.tasks.segmentation.picture import PredictionPicture, draw_predictions
    from lora_plugins.tasks.segmentation.scenes import DigitScenesDataModule
    from lora_plugins.tasks.segmentation.task import SemanticSegmentationTask
    from lora_plugins.tasks.tensorboard import TensorBoardImages
    from lora_plugins.tasks.threads import CpuThreads

__all__ = [
    "BeforeAfter",
    "CpuThreads",
    "DataError",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "HtmlReport",
    "HubImageDataModule",
    "HubMaskDataModule",
    "ImageClassificationTask",
    "ImageFolderDataModule",
    "ImageListDataModule",
    "MaskFolderDataModule",
    "MaskListDataModule",
    "ModelConfig",
    "PredictionPicture",
    "SemanticSegmentationTask",
    "TensorBoardImages",
    "VisionDataModule",
    "WeightsError",
    "draw_predictions",
    "export_task",
    "load_task",
    "merged_task",
    "predict_folder",
]

_MODULES = {
    "BeforeAfter": "before_after",
    "CpuThreads": "threads",
    "DataError": "errors",
    "DigitScenesDataModule": "segmentation.scenes",
    "DigitsDataModule": "classification.digits",
    "HtmlReport": "report",
    "HubImageDataModule": "classification.hub",
    "HubMaskDataModule": "segmentation.hub",
    "ImageClassificationTask": "classification.task",
    "ImageFolderDataModule": "classification.folder",
    "ImageListDataModule": "classification.listed",
    "MaskFolderDataModule": "segmentation.folder",
    "MaskListDataModule": "segmentation.listed",
    "ModelConfig": "models",
    "PredictionPicture": "segmentation.picture",
    "SemanticSegmentationTask": "segmentation.task",
    "TensorBoardImages": "tensorboard",
    "VisionDataModule": "data",
    "WeightsError": "errors",
    "draw_predictions": "segmentation.picture",
    "export_task": "export",
    "load_task": "loading",
    "merged_task": "loading",
    "predict_folder": "predict",
}

__getattr__ = lazily(__name__, _MODULES)
