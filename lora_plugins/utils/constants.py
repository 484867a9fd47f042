"""Constants, copied once to each device."""

import functools

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_plugins.utils.transforms import transforms_are_active


def on_device(constant: Tensor, device: torch.device) -> Tensor:
    """Returns a constant of the CPU on a device; copied there once, since each copy waits for the device.

    Args:
        constant: It lives as long as the process.
        device: Where it is wanted.
    """
    if constant.device == device or is_compiling() or _is_recorded():
        return constant.to(device)
    copy = _copied(constant, device)
    if type(copy) is not Tensor:  # made in a mode, such as that of fake tensors, which may end
        _copied.cache_clear()
    return copy


def _is_recorded() -> bool:
    """Whether a copy would belong to a trace, where the next one lacks it, or to a transform, which ends."""
    return torch.jit.is_tracing() or transforms_are_active()  # type: ignore[attr-defined, no-untyped-call]


@functools.cache
def _copied(constant: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return constant.to(device)
