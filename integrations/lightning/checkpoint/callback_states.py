"""The frozen base in the states of callbacks, such as an average of the module: a file leaves it out there as well."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_plugins.integrations.lightning.checkpoint.nested_paths import Path, changed_at
from lora_plugins.integrations.lightning.module import checksum, equal
from lora_plugins.utils import is_dense

CALLBACKS = "callbacks"

_SMALLEST = 256
"""Elements of a tensor that is left out: smaller ones save nothing, and may be equal by chance."""


def without_base_of_callbacks(
    checkpoint: Mapping[str, Any], base: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[tuple[list[Any], str]]]:
    """Returns a checkpoint whose callbacks have nothing of `base`, which it leaves out, and where they had what of it.

    What they call a tensor is their matter: those are left out that have the very values of one of the base.
    """
    states = checkpoint.get(CALLBACKS, {})
    large = [(path, value) for path, value in _tensors(states, ()) if value.numel() >= _SMALLEST]
    shapes = {value.shape for _, value in large}
    names = {checksum(tensor): name for name, tensor in base.items() if tensor.shape in shapes}
    found = [(path, name) for path, value in large if (name := names.get(checksum(value))) and equal(base[name], value)]
    for path, _ in found:
        states = changed_at(states, path, lambda _: None)  # its place stays: some pair by position
    return {**checkpoint, CALLBACKS: states} if found else {**checkpoint}, [([*path], name) for path, name in found]


def with_base_of_callbacks(
    checkpoint: Mapping[str, Any], found: Sequence[tuple[Sequence[Any], Tensor]]
) -> dict[str, Any]:
    """Returns a checkpoint whose callbacks have, where they had it, copies of the base, into which they may write."""
    states = checkpoint.get(CALLBACKS, {})
    present = [(path, tensor) for path, tensor in found if path[0] in states]  # somebody may have removed a state
    for path, tensor in present:
        states = changed_at(states, path, partial(_copy_of, tensor))
    return {**checkpoint, CALLBACKS: states} if present else {**checkpoint}


def _tensors(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(each, (*path, key))
    elif type(value) in (Tensor, torch.nn.Parameter) and is_dense(value):
        yield path, value


def _copy_of(tensor: Tensor, _: None) -> Tensor:
    return tensor.detach().cpu().clone()
