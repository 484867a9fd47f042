"""What a plugin returned in place of a tensor of some shape, or of one that has values to save."""

from typing import Any

import torch
from torch import Tensor


def shape_or_value(value: Any) -> Any:
    """Returns the shape of a tensor, as a plain tuple; anything else as it is."""
    return tuple(value.shape) if isinstance(value, Tensor) else value


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has a value for each of its places, as those have that a file can hold."""
    return tensor.layout is torch.strided and not tensor.is_meta
