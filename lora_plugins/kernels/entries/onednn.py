"""Large products in float32 by oneDNN, on a CPU with AVX-512 of another maker than Intel.

torch gives products in float32 to MKL, which on processors of other makers than Intel uses half the width of their
registers; oneDNN, which has torch's convolutions, uses all of it. On processors of Intel, MKL is as fast or faster: the
gradients of weights in a ViT took oneDNN 1.3 to 2.2 times as long there (measured). oneDNN's function is private to
torch and has no gradient, so it computes only what needs none, as inside of autograd functions.
"""

import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_plugins.kernels._eager import eager_is_unknown, is_eager
from lora_plugins.kernels._kernel import Kernel, missing_from_torch

_LEAST = 2**20
"""Multiplications that are worth the start of oneDNN: ten microseconds, and 200 for a shape's first time (measured)."""

_PLAIN = (Tensor, nn.Parameter)


def available() -> str:
    """Says why oneDNN is not used here; empty if it is."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return f"it needs a processor with AVX512, and torch uses {capability} of this one"
    if "GenuineIntel" in _processor():
        return "on processors of Intel, MKL is as fast"
    return missing_from_torch("ops.mkldnn._linear_pointwise.default", "_C._get_mkldnn_enabled") or eager_is_unknown()


def _processor() -> str:
    """Returns what names the maker of the processor."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.is_file() else platform.processor()


def suits(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN is faster and right.

    Args:
        left: One matrix.
        right: The other one, either way round; a part of a larger one would take thousands of times as long.
        bias: What is added; one that is strided would be read wrongly without a word.
    """
    return (
        left.shape[0] * right.numel() >= _LEAST
        and left.dtype == right.dtype == torch.float32
        and left.is_cpu
        and (right.is_contiguous() or right.T.is_contiguous())
        and type(left) in _PLAIN
        and type(right) in _PLAIN
        and (bias is None or (bias.is_contiguous() and bias.dtype == torch.float32 and type(bias) in _PLAIN))
        and torch._C._get_mkldnn_enabled()
        and not torch.is_grad_enabled()
        and is_eager(left)
    )


def linear_2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x Wᵀ + b`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def _suits_last_two(_: Tensor, left: Tensor, right: Tensor, scale: float) -> bool:
    return suits(left, right)


def _add_scaled_product(matrix: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    return linear_2d(left, (right * scale).T).add_(matrix)


def _scaled_product(_: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    return linear_2d(left, right.T).mul_(scale)


KERNELS = (
    Kernel("onednn", "linear_2d", available, suits, linear_2d),
    Kernel("onednn", "add_scaled_product", available, _suits_last_two, _add_scaled_product),
    Kernel("onednn", "scaled_product", available, _suits_last_two, _scaled_product),
)
