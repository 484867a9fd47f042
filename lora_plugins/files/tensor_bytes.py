"""Tensors as a safetensors file holds them: as they are, or as bytes where it has no place for their type."""

from contextlib import suppress
from functools import cache
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


@cache
def is_brought_back(dtype: torch.dtype) -> bool:
    """Whether safetensors reads what it writes of a type: it writes no complex128, and reads no float8_e8m0fnu."""
    try:
        safetensors.torch.load(safetensors.torch.save({"": torch.empty(0, dtype=dtype, device="cpu")}))
    except KeyError:  # in its tables of types
        return False
    return True


def to_file(tensor: Tensor) -> Tensor:
    """Returns a tensor for the file: itself, or its bytes, of which the manifest says what they are."""
    tensor = tensor.cpu().contiguous()
    return tensor if is_brought_back(tensor.dtype) else tensor.flatten().view(torch.uint8)


def from_file(tensor: Tensor, entry: Any) -> Tensor:
    """Returns a tensor as the manifest describes it, if the file holds its bytes; any other one as it is."""
    with suppress(AttributeError, KeyError, RuntimeError, TypeError):  # of an entry that fits nothing: compared later
        dtype = getattr(torch, entry["dtype"])
        if not is_brought_back(dtype):
            return tensor.view(dtype).reshape(entry["shape"])
    return tensor
