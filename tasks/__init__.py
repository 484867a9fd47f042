"""Vision tasks of lora_plugins; imported as `lora_plugins.tasks`.

Image classification and semantic segmentation over models of timm, transformers, torchvision and
segmentation-models-pytorch, and text-to-image diffusion over pipelines of diffusers; data modules for files on disk,
for data sets of Hugging Face and for data that needs no download; and callbacks that show what a fit has done. The YAML
files beside this module put them together.

Names are imported when they are first used: the libraries behind them take seconds.
"""

from typing import TYPE_CHECKING

from lora_plugins.lazy import lazily

if __name__ != "lora_plugins.tasks":
    raise ImportError(
        f"This package was imported as {__name__!r}. Import it as 'lora_plugins.tasks': a file that is imported "
        "under two names becomes two modules, with two sets of classes."
    )

if TYPE_CHECKING:
    from lora_plugins.tasks.classification import (
        HubImageDataModule,
        ImageClassificationTask,
        ImageFolderDataModule,
        ImageListDataModule,
    )
    from lora_plugins.tasks.data import VisionDataModule
    from lora_plugins.tasks.diffusion import (
        ClassPictures,
        PicturesDataModule,
        SamplePictures,
        SavePipeline,
        TextToImageTask,
    )
    from lora_plugins.tasks.errors import DataError, ReportError, WeightsError
    from lora_plugins.tasks.examples import (
        DigitPicturesDataModule,
        DigitScenesDataModule,
        DigitsDataModule,
        ReadDigits,
    )
    from lora_plugins.tasks.inference import export_task, load_base, load_task, merged_task, predict_folder
    from lora_plugins.tasks.models import ModelConfig
    from lora_plugins.tasks.reporting import (
        BeforeAfter,
        HtmlReport,
        PredictionPicture,
        TensorBoardImages,
        draw_predictions,
    )
    from lora_plugins.tasks.segmentation import (
        HubMaskDataModule,
        MaskFolderDataModule,
        MaskListDataModule,
        SemanticSegmentationTask,
    )
    from lora_plugins.tasks.training import warmup_cosine

__all__ = [
    "BeforeAfter",
    "ClassPictures",
    "DataError",
    "DigitPicturesDataModule",
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
    "PicturesDataModule",
    "PredictionPicture",
    "ReadDigits",
    "ReportError",
    "SamplePictures",
    "SavePipeline",
    "SemanticSegmentationTask",
    "TensorBoardImages",
    "TextToImageTask",
    "VisionDataModule",
    "WeightsError",
    "draw_predictions",
    "export_task",
    "load_base",
    "load_task",
    "merged_task",
    "predict_folder",
    "warmup_cosine",
]

_ROOMS = {
    **dict.fromkeys(
        ("HubImageDataModule", "ImageClassificationTask", "ImageFolderDataModule", "ImageListDataModule"),
        "classification",
    ),
    "VisionDataModule": "data",
    **dict.fromkeys(
        ("ClassPictures", "PicturesDataModule", "SamplePictures", "SavePipeline", "TextToImageTask"), "diffusion"
    ),
    **dict.fromkeys(("DataError", "ReportError", "WeightsError"), "errors"),
    **dict.fromkeys(("DigitPicturesDataModule", "DigitScenesDataModule", "DigitsDataModule", "ReadDigits"), "examples"),
    **dict.fromkeys(("export_task", "load_base", "load_task", "merged_task", "predict_folder"), "inference"),
    "ModelConfig": "models",
    **dict.fromkeys(
        ("BeforeAfter", "HtmlReport", "PredictionPicture", "TensorBoardImages", "draw_predictions"), "reporting"
    ),
    **dict.fromkeys(
        ("HubMaskDataModule", "MaskFolderDataModule", "MaskListDataModule", "SemanticSegmentationTask"), "segmentation"
    ),
    "warmup_cosine": "training",
}

__getattr__, __dir__ = lazily(__name__, _ROOMS, extra="vision")
