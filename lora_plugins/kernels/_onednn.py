"""oneDNN's product of matrices on a CPU, which torch has for its compiler.

It is private to torch and has no gradient, so it computes only what needs none, as inside of autograd functions.
"""

import torch
from torch import Tensor, nn

from lora_plugins.kernels._eager import eager_is_unknown, is_eager
from lora_plugins.kernels._kernel import missing_from_torch

_LEAST = 2**20
"""Multiplications that are worth the start of oneDNN: ten microseconds, and 200 for a shape's first time (measured)."""

_PLAIN = (Tensor, nn.Parameter)


def unavailable() -> str:
    """Says why it cannot be called; empty if it can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without oneDNN"
    return missing_from_torch("ops.mkldnn._linear_pointwise.default", "_C._get_mkldnn_enabled") or eager_is_unknown()


def takes(dtype: torch.dtype, left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product is large enough, and oneDNN right.

    Args:
        dtype: Of the product.
        left: One matrix.
        right: The other one, `(out, in)`; a part of a larger one would take thousands of times as long.
        bias: What is added; a strided one would silently be read wrongly.
    """
    return (
        left.shape[0] * right.numel() >= _LEAST
        and left.shape[1] == right.shape[1]
        and left.dtype == right.dtype == dtype
        and left.is_cpu
        and (right.is_contiguous() or right.T.is_contiguous())
        and type(left) in _PLAIN
        and type(right) in _PLAIN
        and (bias is None or (bias.is_contiguous() and bias.dtype == dtype and type(bias) in _PLAIN))
        and (bias is None or bias.shape == right.shape[:1])
        and torch._C._get_mkldnn_enabled()
        and not torch.is_grad_enabled()
        and is_eager(left)
    )


def linear_2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x Wᵀ + b`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y
