"""Restores the adapter of a model from a checkpoint."""

from pathlib import Path

import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraModel
from lora_plugins.errors import listing
from lora_plugins.files import MANIFEST, differing_base, differing_config, read


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter folder."""
    return (folder / MANIFEST).is_file()


def restore(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Restores an adapter from a saved one of the same configuration, on the same base.

    Its tensors stay the same objects, with which an optimizer goes on, unless its init has changed the base otherwise
    than in the file, or has given other ranks: then it is taken off and put on again.

    Args:
        model: The model.
        adapter_name: The adapter.
        folder: The adapter folder.

    Raises:
        AdapterFileError: If the file is damaged, has another configuration or belongs to another base. The model has
            its adapter as it was then.
    """
    saved = read(folder)
    own = LoraModel(model).pack(adapter_name)
    if details := differing_config(own, saved):
        raise AdapterFileError(
            f"{folder} has an adapter of another configuration: {details}. Use the configuration of the file, or start "
            "without resume_from_checkpoint."
        )
    if wrong := differing_base(own, saved):
        raise AdapterFileError(
            f"{folder} has an adapter that was trained on another base: {listing(wrong)} differ from the weights it "
            "was made for. Load the same pretrained weights first, unmerged, or start without resume_from_checkpoint."
        )
    if all(own.manifest[part] == saved.manifest[part] for part in ("changed", "tensors")):
        with torch.no_grad():
            for key, tensor in own.tensors.items():
                tensor.copy_(saved.tensors[key])
        return
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    LoraModel(model).delete_adapter(adapter_name)
    try:
        LoraModel.load_packed(model, saved, adapter_name)
    except BaseException:
        LoraModel.load_packed(model, own, adapter_name)
        raise
    finally:
        LoraModel(model).set_adapter(adapter_name)  # where others are on the model, a new one waits
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))  # what the user froze stays frozen
