"""The version counter of a tensor, by which autograd finds out that a value it has saved is no longer there.

Setting it to a former number needs a private function of torch. Without that function, a backward through what was
computed before a value was exchanged for some time ends in torch's error, though the value is back.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    from torch._C._autograd import _unsafe_set_version_counter as _set
except ImportError:
    _set = None  # type: ignore[assignment]

Versions = tuple[tuple[Tensor, int], ...]
"""Tensors with the version that each had."""

_FAR = 1 << 20
"""So far apart are the versions of a value and of its stand-in that no number of steps makes them the same."""


def version(tensor: Tensor) -> int:
    """Returns how often a tensor was written in place; 0 for one of inference mode, of which nothing tells it."""
    return 0 if tensor.is_inference() else tensor._version


def put_value(tensor: Tensor, value: Tensor) -> None:
    """Gives a tensor another value for good; an earlier forward has no backward any more that needs the former one."""
    tensor.data = value
    increment_version(tensor)
    torch.clear_autocast_cache()  # casts of parameters, kept until autocast ends, whatever their versions


def mark_stand_ins(tensors: Iterable[Tensor]) -> Versions:
    """Marks tensors as holding another value for some time; returns what `mark_restored` takes afterwards."""
    versions = tuple((tensor, tensor._version) for tensor in tensors if not tensor.is_inference())
    for tensor, version in versions:
        _move(tensor, version + _FAR)
    return versions


def mark_restored(versions: Versions) -> None:
    """Marks tensors as holding the values again that they had at these versions."""
    for tensor, version in versions:
        _move(tensor, version)


def _move(tensor: Tensor, version: int) -> None:
    if _set is None:
        increment_version(tensor)
    else:
        _set((tensor,), (version,))
