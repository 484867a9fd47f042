"""Adapter-only checkpoints without a Trainer."""

import io
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lora_plugins import AdapterFileError
from lora_plugins.integrations.lightning.checkpoint.content import KEY, checked_entry, reading, restore

Module = TypeVar("Module", bound=LightningModule)


class LoraCheckpointMixin(LightningModule):
    """Lets `YourModule.load_from_checkpoint(path)` load adapter-only checkpoints.

    Give it to the module's class, before other base classes. The module is built first, with its own pretrained base;
    then the adapters of the file are put on it. Checkpoints without adapters load as ever.
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the adapters onto the module and completes the state dict with the module's own base.

        Raises:
            AdapterFileError: If the adapters do not fit the module.
        """
        super().on_load_checkpoint(checkpoint)
        if KEY in checkpoint:
            checkpoint.update(restore(self, checkpoint))


def load_from_checkpoint(
    module_class: type[Module], path: str | Path, *, map_location: Any = "cpu", **kwargs: Any
) -> Module:
    """Loads an adapter-only checkpoint of any LightningModule class.

    Args:
        module_class: The class, or one that it inherits from if the checkpoint names its class (those that the command
            line wrote do).
        path: The checkpoint.
        map_location: Where to put the tensors, as in `torch.load`.
        **kwargs: Arguments of the class that the checkpoint does not know or that are to be replaced.

    Returns:
        The module, adapted and in its own class, with its adapters active. `LoraModel(module)` is a handle to them.

    Raises:
        AdapterFileError: If the file is damaged, holds no adapter, or was made for another base.
    """
    checkpoint = read(path, map_location)
    if KEY not in checkpoint:
        raise AdapterFileError(
            f"{path} holds no adapter of lora_plugins. A plain checkpoint is loaded by "
            f"{module_class.__name__}.load_from_checkpoint."
        )
    checked_entry(checkpoint)
    real = _named_class(checkpoint, module_class)
    loading: Any = real
    if not issubclass(real, LoraCheckpointMixin):
        loading = type(real.__name__, (LoraCheckpointMixin, real), {"__module__": real.__module__})
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    module: Module = loading.load_from_checkpoint(
        buffer, map_location=map_location, strict=True, weights_only=True, **kwargs
    )
    module.__class__ = real
    return module


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint without unpickling objects.

    Raises:
        AdapterFileError: If it is not a file that `torch.load(weights_only=True)` can read.
    """
    with reading(path):
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(checkpoint, dict):
        raise AdapterFileError(f"{path} is not a checkpoint of Lightning.")
    return checkpoint


def _named_class(checkpoint: dict[str, Any], module_class: type[Module]) -> type[Module]:
    """The class that the checkpoint names, which has to be imported already; else the one that was given.

    Its name is removed: Lightning would refuse it for not being a subclass of the temporary class.
    """
    arguments = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    path = arguments.pop("_class_path", None)
    if path is None:
        return module_class
    module, _, name = str(path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, module_class)):
        raise AdapterFileError(
            f"The checkpoint was made from {path}, which is not an imported subclass of {module_class.__name__}. "
            "Import it and load from it."
        )
    return found
