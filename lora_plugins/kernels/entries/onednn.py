"""Large products in float32 by oneDNN, on a CPU with AVX-512 that is not of Intel.

torch gives products in float32 to MKL, which on processors of other makers than Intel uses half the width of their
registers; oneDNN, which has torch's convolutions, uses all of it. On processors of Intel, MKL is as fast or faster: the
gradients of weights in a ViT took oneDNN 1.3 to 2.2 times as long there (measured).
"""

import platform
from pathlib import Path

import torch
from torch import Tensor

from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels._onednn import linear_2d, takes, unavailable


def available() -> str:
    """Says why oneDNN is not used here; empty if it is."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"it needs a processor with AVX512, and torch uses {capability} of this one"
    if "GenuineIntel" in _processor():
        return "on processors of Intel, MKL is as fast"
    return unavailable()


def _processor() -> str:
    """Returns what names the maker of the processor."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.is_file() else platform.processor()


def _suits(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    return takes(torch.float32, left, right, bias)


def _suits_last_two(_: Tensor, left: Tensor, right: Tensor, scale: float) -> bool:
    return takes(torch.float32, left, right.T)


def _add_scaled_product(matrix: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    return linear_2d(left, (right * scale).T).add_(matrix)


def _scaled_product(_: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    return linear_2d(left, right.T).mul_(scale)


KERNELS = (
    Kernel("onednn", "linear_2d", available, _suits, linear_2d),
    Kernel("onednn", "add_scaled_product", available, _suits_last_two, _add_scaled_product),
    Kernel("onednn", "scaled_product", available, _suits_last_two, _scaled_product),
)
