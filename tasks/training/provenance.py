"""What a file of weights is of: the task, its model and its classes, written beside the weights in plain JSON.

An adapter folder holds it in its manifest, a merged safetensors file in its metadata, a checkpoint in its
hyperparameters. `lora_plugins.tasks.inference` builds the task again from any of the three.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save

from lora_plugins.files.folder import MANIFEST, replace_file
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks.data import VisionDataModule

if TYPE_CHECKING:
    from lora_plugins.tasks.training.vision_task import VisionTask

KEY = "task"
METADATA = "lora_plugins.task"


def description(task: VisionTask) -> dict[str, Any]:
    """The task as plain types: its class, its arguments, the names of its classes and the size of its images."""
    return {
        "class": f"{type(task).__module__}.{type(task).__qualname__}",
        "arguments": json.loads(json.dumps(dict(task.hparams))),
        "image_size": _image_size(task),
        "interpolation": task.interpolation,
    }


def describe_files(task: VisionTask) -> None:
    """Write the description into what the trainer's `LoraCallback`s have written: adapter folders and merged files."""
    trainer = task.trainer
    if trainer.fast_dev_run or not trainer.is_global_zero:
        return
    for callback in trainer.callbacks:
        if isinstance(callback, LoraCallback):
            if callback.save_adapter_to is not None:
                describe_adapter(Path(callback.save_adapter_to), task, callback.target)
            if callback.export_to is not None:
                describe_weights(Path(callback.export_to), task)


def describe_adapter(folder: Path, task: VisionTask, target: str | None) -> None:
    """Write the description into the manifest of an adapter folder, with the name of the submodule it adapts."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    replace_file(path, json.dumps({**manifest, KEY: {**description(task), "target": target}}, indent=1).encode())


def describe_weights(path: Path, task: VisionTask) -> None:
    """Write the description into the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    replace_file(path, save(load_file(path), {**metadata, METADATA: json.dumps(description(task))}))


def _image_size(task: VisionTask) -> list[int] | None:
    """The size that the task was trained with, or else the one that its network was made for."""
    data = getattr(task.trainer, "datamodule", None) if task._trainer is not None else None
    size = (data.size() if isinstance(data, VisionDataModule) else None) or task.image_size
    return None if size is None else list(size)
