"""The plain state dict of a merged module, and the `.safetensors` file that holds it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.files import is_brought_back
from lora_plugins.utils import replace_file


def plain_state_dict(target: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a plain module with no two tensors sharing memory, as safetensors requires.

    Raises:
        StateError: As `checked_state_dict` does.
    """
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in checked_state_dict(target).items()}


def checked_state_dict(target: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a module, once it is known that a `.safetensors` file can hold it.

    Raises:
        StateError: If it holds something else than tensors, or tensors of other types, naming the keys.
    """
    state = whole_state_dict(target)
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise StateError(
            f"{listing(others)} of the state dict of {type(target).__name__} are no tensors (get_extra_state), and a "
            ".safetensors file holds nothing else. Leave export_to out: a checkpoint of the merged module has them."
        )
    odd = {key: str(value.dtype) for key, value in state.items() if not is_brought_back(value.dtype)}
    if odd:
        raise StateError(
            f"{listing(odd)} of the state dict of {type(target).__name__} are {listing(sorted({*odd.values()}))}, of "
            "which a .safetensors file has no tensors that can be read again. Leave export_to out: a checkpoint of the "
            "merged module has them."
        )
    return state


def whole_state_dict(module: nn.Module) -> dict[str, Any]:
    """Returns the state dict of a module, or torch's where its own leaves out what was frozen and is merged now."""
    own: dict[str, Any] = module.state_dict()
    whole: dict[str, Any] = nn.Module.state_dict(module)
    return own if _memory(whole) <= _memory(own) else whole  # whose names may be others


def _memory(state: Mapping[str, Any]) -> set[int]:
    return {value.data_ptr() for value in state.values() if isinstance(value, Tensor)}


def write_safetensors(path: Path, tensors: dict[str, Tensor], entries: Mapping[str, Any]) -> Path:
    """Writes tensors so that a killed process leaves the old file or the new one; returns the path.

    The entries go into the metadata, as JSON under the name `lora_plugins.NAME`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {f"lora_plugins.{name}": json.dumps(entry) for name, entry in entries.items()}
    replace_file(path, safetensors.torch.save(tensors, metadata={"format": "pt", **said}))
    return path
