"""Provenance: which task, model and classes a file of weights is of, in plain JSON beside the weights.

An adapter folder holds it in its manifest, a merged safetensors file in its metadata, a checkpoint under its key.
`lora_plugins.tasks.inference` builds the task again from any of the three.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save

from lora_plugins.files import add_entry
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.utils import replace_file

PROVENANCE_KEY = "task"
"""Its key in a checkpoint and in the manifest of an adapter folder."""

METADATA_KEY = "lora_plugins.task"
"""Its key in the metadata of a safetensors file."""

Provenance = Mapping[str, Any]


def write_provenance(trainer: Trainer, provenance: Callable[[], Provenance]) -> None:
    """Write provenance into the files of the trainer's `LoraCallback`s: adapter folders and merged files.

    Args:
        trainer: The trainer.
        provenance: Makes the provenance, if there is a file to write it into.
    """
    run: Any = trainer  # whose types lack some attributes
    if run.fast_dev_run or not trainer.is_global_zero:
        return
    for callback in run.callbacks:
        if isinstance(callback, LoraCallback):
            for file in callback.adapter_files:
                if file.is_ours:
                    add_entry(Path(file.path), PROVENANCE_KEY, {**provenance(), "target": callback.target})
            if callback.export_to is not None:
                _write_metadata(Path(callback.export_to), provenance())


def _write_metadata(path: Path, provenance: Provenance) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    replace_file(path, save(load_file(path), {**metadata, METADATA_KEY: json.dumps(provenance)}))
