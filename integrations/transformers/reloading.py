"""Gives the adapter of a model the values that a checkpoint has for it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraModel
from lora_plugins.files import MANIFEST, PackedAdapter, read, same


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter folder."""
    return (folder / MANIFEST).is_file()


def restore(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Gives an adapter the values of a saved one of the same configuration.

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
    _check_config(folder, own.manifest["config"], saved.manifest["config"])
    if _fits(own, saved):
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


def _check_config(folder: Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    different = [name for name in here if here[name] != there.get(name)]
    if different:
        details = "; ".join(f"{name} is {there.get(name)!r} in the file and {here[name]!r} here" for name in different)
        raise AdapterFileError(
            f"{folder} has an adapter of another configuration: {details}. Use the configuration of the file, or start "
            "without resume_from_checkpoint."
        )


def _fits(own: PackedAdapter, saved: PackedAdapter) -> bool:
    """Whether the tensors of one can take the values of the other, on the same base."""
    if own.manifest["changed"] != saved.manifest["changed"] or own.manifest["tensors"] != saved.manifest["tensors"]:
        return False
    base, found = saved.manifest["base"], own.manifest["base"]
    return all(key in base and same(found[key], base[key]) for key in found)
