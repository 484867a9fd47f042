"""A task again from what a fit has left: a checkpoint, an adapter folder, or a merged safetensors file."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_plugins import LoraModel
from lora_plugins.files.folder import MANIFEST
from lora_plugins.integrations.lightning.checkpoint import adapted_targets
from lora_plugins.integrations.lightning.loading import read
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.training import KEY, METADATA, VisionTask


def load_task(path: str | Path) -> VisionTask:
    """Build the task that a file was written by, with its weights, ready to predict.

    Args:
        path: A checkpoint (`.ckpt`), an adapter folder, or a merged file (`.safetensors`) of one of our tasks. The base
            of a checkpoint with an adapter, and of an adapter folder, is read from where the task had it from.

    Returns:
        The task in evaluation mode; its `image_size` and `interpolation` are those that it was trained with.

    Raises:
        WeightsError: Where there is no such file, or where it does not say what it is of.
        AdapterFileError: Where an adapter does not fit its base.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"There is no {path}. Give a checkpoint, an adapter folder or a merged safetensors file.")
    if path.is_dir():
        about = _described(_json(path / MANIFEST).get(KEY), path)
        task = _task_class(about, path)(**about["arguments"])
        target = task.get_submodule(about.get("target") or "")
        LoraModel.load_adapter(target, path)
    elif path.suffix == ".safetensors":
        about = _described(_metadata(path), path)
        arguments = about["arguments"]
        model = {**arguments["model"], "weights": str(path), "head": "auto"}
        task = _task_class(about, path)(**{**arguments, "model": model})
    else:
        about = _described(read(path).get(KEY), path)
        task = _task_class(about, path).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    size = about["image_size"]
    task.image_size, task.interpolation = None if size is None else (size[0], size[1]), about["interpolation"]
    return task.eval()


def merged_task(path: str | Path) -> VisionTask:
    """As `load_task`, with the adapters merged, so that nothing but plain layers is left."""
    task = load_task(path)
    for module in adapted_targets(task).values():
        LoraModel(module).merge_and_unload()
    return task


def _described(about: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(about, Mapping) or not {"class", "arguments", "image_size", "interpolation"} <= about.keys():
        raise WeightsError(
            f"{path} does not say which task it is of. Files that a task's fit has written do: a checkpoint, or what "
            "`save_adapter_to` and `export_to` of the LoraCallback name."
        )
    return about


def _task_class(about: Mapping[str, Any], path: Path) -> type[VisionTask]:
    """The class, of ours or of a module that the caller has imported: a file is not to choose what is imported."""
    module, _, name = str(about["class"]).rpartition(".")
    own = module.startswith("lora_plugins.tasks.")
    found = getattr(importlib.import_module(module) if own else sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, VisionTask)):
        raise WeightsError(f"{path} is of the task {about['class']}, which is not imported. Import it, and load again.")
    return found


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, Mapping) else {}


def _metadata(path: Path) -> Any:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(METADATA, "null"))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error
