"""Text-to-image diffusion: the task, pictures with prompts and of a class, samples and a report, `generate`.

Pipelines are those of diffusers; families of them, and their layers, are in `lora_plugins.integrations.diffusers`.
"""

from lora_plugins.tasks.diffusion.class_pictures import ClassPictures
from lora_plugins.tasks.diffusion.generate import main as generate_main
from lora_plugins.tasks.diffusion.packaged import pipeline_source
from lora_plugins.tasks.diffusion.pictures_module import PicturesDataModule
from lora_plugins.tasks.diffusion.sample_pictures import SamplePictures
from lora_plugins.tasks.diffusion.save_pipeline import SavePipeline
from lora_plugins.tasks.diffusion.text_to_image import TextToImageTask, without_adapters

__all__ = [
    "ClassPictures",
    "PicturesDataModule",
    "SamplePictures",
    "SavePipeline",
    "TextToImageTask",
    "generate_main",
    "pipeline_source",
    "without_adapters",
]
