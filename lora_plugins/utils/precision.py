"""The precision that values of adapters have at least."""

import torch


def single_at_least(dtype: torch.dtype) -> torch.dtype:
    """Returns a floating type, or float32 for a narrower one: torch knows no common type of it and one of 8 bits."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype
