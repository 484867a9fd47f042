"""What a plugin returned in place of a tensor of some shape, for messages."""

from typing import Any

from torch import Tensor


def shape_or_value(value: Any) -> Any:
    """Returns the shape of a tensor, as a plain tuple; anything else as it is."""
    return tuple(value.shape) if isinstance(value, Tensor) else value
