"""Restores the adapter of a model from a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_plugins import AdapterFileError, LoraModel
from lora_plugins.adapter import whole
from lora_plugins.files import MANIFEST, PackedAdapter, by_same_plugins, differing_base, differing_config, read


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter folder."""
    return (folder / MANIFEST).is_file()


def restore(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Restores an adapter from a saved one of the same configuration.

    Its tensors stay the same objects, so that an optimizer goes on with them. Only where the init has changed the base
    in another way than in the file, or has given other ranks, or where another plugin is installed since, is the
    adapter taken off and put on again.

    Raises:
        AdapterFileError: If the file is damaged, has another configuration or belongs to another base. The model has
            its adapter as it was then.
    """
    saved = read(folder)
    own = LoraModel(model).pack(adapter_name)
    if details := differing_config(own.manifest["config"], saved.manifest["config"]):
        raise AdapterFileError(
            f"{folder} has an adapter of another configuration: {details}. Use the configuration of the file, or start "
            "without resume_from_checkpoint."
        )
    alike = all(own.manifest[part] == saved.manifest[part] for part in ("changed", "tensors"))
    if alike and by_same_plugins(own, saved) and not differing_base(own, saved):
        _copy(own.tensors, saved.tensors)
    else:
        whole(model, lambda: _put_anew(model, adapter_name, saved))


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Writes values into tensors; where it is stopped, they have their own again."""
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    try:
        for key, tensor in tensors.items():
            tensor.copy_(values[key])
    except BaseException:
        for key, tensor in tensors.items():
            tensor.copy_(before[key])
        raise


def _put_anew(model: nn.Module, adapter_name: str, saved: PackedAdapter) -> None:
    """Takes an adapter off, and puts a saved one in its place."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    LoraModel(model).delete_adapter(adapter_name)
    LoraModel.load_packed(model, saved, adapter_name)
    LoraModel(model).set_adapter(adapter_name)  # where others are on the model, a new one waits
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required.get(name, parameter.requires_grad))  # what the user froze stays frozen
