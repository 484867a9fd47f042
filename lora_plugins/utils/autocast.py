"""Autocast as the law sees it: a layer computes in its type, an update is added to a weight in full."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Returns the type that autocast computes in; None where it leaves the tensor alone, as in float64."""
    device = tensor.device.type
    # meta has no autocast. torch.amp.is_autocast_available says so too, but torch.compile of 2.8 cannot trace it.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def in_full(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on the tensor's device, where merging would otherwise differ from adapting."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
