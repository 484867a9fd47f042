"""Loads adapter-only checkpoints without a Trainer."""

import io
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lora_plugins import AdapterFileError
from lora_plugins.integrations.lightning.checkpoint.entry import KEY, checked_entry
from lora_plugins.integrations.lightning.checkpoint.late_layers import build_missing, with_present_base, without_base
from lora_plugins.integrations.lightning.checkpoint.reading import read_checkpoint
from lora_plugins.integrations.lightning.checkpoint.restoring import restore

Module = TypeVar("Module", bound=LightningModule)


class LoraCheckpointMixin(LightningModule):
    """Lets `YourModule.load_from_checkpoint(path)` load adapter-only checkpoints.

    Name it before the other base classes of the module's class. The module is built first, with its own pretrained
    base; then the adapters of the file are attached to it. Checkpoints without adapters load as usual.
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the adapters onto the module and completes the state dict with the module's own base.

        Raises:
            AdapterFileError: If the adapters do not fit the module.
        """
        if KEY not in checkpoint:
            super().on_load_checkpoint(checkpoint)
            return
        checkpoint.update(with_present_base(self, checkpoint))
        super().on_load_checkpoint(checkpoint)
        build_missing(self, checkpoint)
        checkpoint.update(restore(self, without_base(self, checkpoint)))


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
    checkpoint = read_checkpoint(path, map_location)
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


def _named_class(checkpoint: dict[str, Any], module_class: type[Module]) -> type[Module]:
    """Returns the class that the checkpoint names, which has to be imported already; without a name, `module_class`.

    The name is removed from the checkpoint: Lightning would refuse a class that is not a subclass of the temporary one.
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
