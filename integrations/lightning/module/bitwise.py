"""Checksums of tensors: whether values are bit for bit what they were, without keeping a copy."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_plugins.utils import is_dense

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The whole numbers of some bytes."""

_BLOCK = 64
"""Words that are side by side in a table of all words, whose rows and columns are added up."""


def local(tensor: Tensor) -> Tensor:
    """Returns a tensor, detached; of a distributed one, the part that this process holds."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.detach()


def checksum(tensor: Tensor) -> int:
    """Returns a checksum of a tensor's bits: of its words by rows and by columns of a table, each by its place.

    So swapped values are noticed as well, and swapped rows of a matrix. Sums wrap around, which is harmless. The device
    makes no difference. Of a tensor that consists of others, as those of torchao do, it is that of their sums.
    """
    own = local(tensor)
    if hasattr(own, "__tensor_flatten__"):
        names, _ = own.__tensor_flatten__()
        return hash(tuple(checksum(getattr(own, name)) for name in names))
    words = _words(own.contiguous().view(-1))
    end = words.numel() // _BLOCK * _BLOCK
    table, rest = words[:end].view(-1, _BLOCK), words[end:]
    sums = [_sum_by_place(each) for each in (table.sum(1, dtype=torch.int64), table.sum(0, dtype=torch.int64), rest)]
    return hash((*torch.stack(sums).tolist(), words.numel()))


def is_constant(tensor: Tensor) -> bool:
    """Whether all elements of a tensor have the same bits.

    It reads memory, as a checksum does: no arithmetic has every type. A tensor that consists of others is constant if
    each of them is.
    """
    own = local(tensor)
    if hasattr(own, "__tensor_flatten__"):
        names, _ = own.__tensor_flatten__()
        return all(is_constant(getattr(own, name)) for name in names)
    if own.numel() == 0:
        return True
    words = _numbers(own).view(own.numel(), -1)
    lowest, highest = words.aminmax(dim=0)
    return torch.equal(lowest, highest)


def equal(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors have the same type, shape and bits, wherever they are; of sparse ones False."""
    if one.dtype != other.dtype or one.shape != other.shape or not (is_dense(one) and is_dense(other)):
        return False
    if hasattr(one, "__tensor_flatten__"):
        names, _ = one.__tensor_flatten__()
        return type(one) is type(other) and all(equal(getattr(one, name), getattr(other, name)) for name in names)
    numbers = (_numbers(each.detach().to(one.device)) for each in (one, other))
    return not hasattr(other, "__tensor_flatten__") and torch.equal(*numbers)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the checksum of each tensor."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def _sum_by_place(words: Tensor) -> Tensor:
    """Returns a sum of words, each by an odd factor of its own, so that any change of one of them changes it."""
    return (words * (2 * torch.arange(len(words), device=words.device) + 1)).sum()


def _numbers(tensor: Tensor) -> Tensor:
    """Views a tensor's memory as a vector of whole numbers, one for each element of up to eight bytes."""
    return tensor.contiguous().view(-1).view(_WORDS.get(tensor.element_size(), torch.int64))


def _words(data: Tensor) -> Tensor:
    """Views a vector's memory as whole numbers, of eight bytes where these have room for it: one fast pass."""
    size = data.element_size()
    if data.numel() * size % 8:
        return data.view(_WORDS[size])
    # They are the same wherever in memory a vector begins; only there, torch has no view of numbers of eight bytes.
    begins_with_a_word = data.storage_offset() * size % 8 == 0
    return (data if begins_with_a_word else data.clone()).view(torch.int64)
