"""Checksums of tensors: whether values are bit for bit what they were, without keeping a copy."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Returns a tensor, detached; of a distributed one, the part that this process holds."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.detach()


def checksum(tensor: Tensor) -> int:
    """Returns a checksum of a tensor's bits: two sums of its words, so that swapped values are noticed as well.

    Both wrap around, which is harmless. The device makes no difference. Of a tensor that consists of others, as those
    of torchao do, it is that of their sums.
    """
    own = local(tensor)
    if hasattr(own, "__tensor_flatten__"):
        names, _ = own.__tensor_flatten__()
        return hash(tuple(checksum(getattr(own, name)) for name in names))
    data = own.contiguous().view(-1)
    if data.numel() == 0:
        return 0
    words = _words(data)
    half = words.numel() // 2
    return hash((int(words.sum(dtype=torch.int64)), int(words[:half].sum(dtype=torch.int64)), words.numel()))


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the checksum of each tensor."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def _words(data: Tensor) -> Tensor:
    """Views a vector's memory as whole numbers, of eight bytes where it can be divided so: one fast pass."""
    size = data.element_size()
    if data.numel() * size % 8 == 0 and data.storage_offset() * size % 8 == 0:
        return data.view(torch.int64)
    return data.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size])
