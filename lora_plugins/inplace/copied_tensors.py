"""The stored tensors of a weight in a copy of a model, which nothing but a state dict may change.

`torch.optim.swa_utils` and others average all parameters of a copy. An exponential average of equal integers, cut off,
is one less, and the copy would compute something else: the tensors of the original are put back.
"""

import weakref
from collections.abc import Mapping
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor

Writes = dict[str, tuple[int, int]]
"""Where tensors lie, and how often they were written to, by name."""


class Original(Protocol):
    """What tensors were copied from."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name."""


class CopiedTensors:
    """Takes note of tensors; they are summed now, and again where something was written to them.

    Args:
        tensors: The copied ones by name.
        original: What they are copied from; it is not kept alive.
    """

    def __init__(self, tensors: Mapping[str, Tensor], original: Original | None) -> None:
        self._original = (lambda: None) if original is None else weakref.ref(original)
        self._writes = _writes(tensors)
        self._sums = _sums(tensors) if self._writes else {}

    def of(self, tensors: Mapping[str, Tensor]) -> "CopiedTensors":
        """Returns the same of other tensors, since they were moved or loaded."""
        return CopiedTensors(tensors, self._original())

    def are_in(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these have the same values; so do those without memory, as in transforms."""
        writes = _writes(tensors)
        if writes is None or writes == self._writes:
            return True
        if _sums(tensors) != self._sums:
            return False
        self._writes = writes
        return True

    def put_back(self, tensors: Mapping[str, Tensor]) -> bool:
        """Gives tensors the values that they had, if the original still has them; returns whether it has."""
        original = self._original()
        if original is None or not _writes(original.tensors) or _sums(original.tensors) != self._sums:
            return False
        for name, tensor in tensors.items():
            tensor.data = original.tensors[name].to(tensor.device, copy=True)
        self._writes = _writes(tensors)
        return True


def _writes(tensors: Mapping[str, Tensor]) -> Writes | None:
    """None if any has no memory to be read."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    try:
        return {name: _write(tensor) for name, tensor in tensors.items()}
    except RuntimeError:
        return None


def _write(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, int]]:
    return {name: (tensor.dtype, _sum(tensor)) for name, tensor in tensors.items()}


def _sum(tensor: Tensor) -> int:
    return crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
