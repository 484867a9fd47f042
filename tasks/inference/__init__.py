"""A fitted task in use: load it from what a fit has left, predict for a folder of images, export it.

`predict_main` and `export_main` are the commands `predict` and `export` of `lora-plugins`.
"""

from lora_plugins.tasks.inference.export import export_task
from lora_plugins.tasks.inference.export import main as export_main
from lora_plugins.tasks.inference.loading import AdapterTask, load_base, load_task, merged_task, task_of_adapter
from lora_plugins.tasks.inference.predict import main as predict_main
from lora_plugins.tasks.inference.predict import predict_folder
from lora_plugins.tasks.inference.probabilities import (
    label_probabilities,
    mask_labels,
    mask_probabilities,
    most_probable,
    resized,
)

__all__ = [
    "AdapterTask",
    "export_main",
    "export_task",
    "label_probabilities",
    "load_base",
    "load_task",
    "mask_labels",
    "mask_probabilities",
    "merged_task",
    "most_probable",
    "predict_folder",
    "predict_main",
    "resized",
    "task_of_adapter",
]
