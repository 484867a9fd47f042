"""The precision that values of adapters have at least, and that two types have in common."""

import torch
from torch import Tensor


def single_at_least(dtype: torch.dtype) -> torch.dtype:
    """Returns a floating type, or float32 for a narrower one: torch knows no common type of it and one of 8 bits."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def common_type(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Returns the type that two floating types are computed in; one of 8 bits, for which it has none, is as float32."""
    return torch.promote_types(*(torch.float32 if dtype.itemsize == 1 else dtype for dtype in (first, second)))


def are_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, told by the least and the largest: `isfinite` of all makes a second copy."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:  # all of whose values are finite
        return True
    if tensor.itemsize == 1:  # which have no order in torch
        tensor = tensor.float()
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def in_float64(tensor: Tensor) -> Tensor:
    """Returns a tensor in float64; on the CPU where its own device has no such type, as GPUs of Apple."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()
