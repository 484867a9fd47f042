"""Products of matrices, by the faster of the two libraries that torch has on a CPU.

torch gives products in float32 to MKL, which on processors of other makers than Intel uses half the width of their
registers; oneDNN, which has torch's convolutions, uses all of it. Its function has no gradient, so it is left to where
none is wanted, as inside of autograd functions.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEAST = 2**20
"""Multiplications that are worth the start of oneDNN: ten microseconds, and 200 for a shape's first time (measured)."""

_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x Wᵀ + b` of matrices: `(rows, out)` from `(rows, in)` and `(out, in)`."""
    return _by_onednn(x, weight, bias) if _suits_onednn(x, weight, bias) else F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left right`."""
    return linear(left, right.T)


def contract(left: Tensor, right: Tensor) -> Tensor:
    """Returns `leftᵀ right`, of matrices with equally many rows."""
    # One of them has to be transposed in memory: the narrower one.
    return matmul(left.T, right) if left.shape[1] <= right.shape[1] else matmul(right.T, left).T


def add_product(weight: Tensor, B: Tensor, A: Tensor, scale: float) -> Tensor:
    """Returns `W + scale · B A`, of matrices of one type; W may be transposed in memory, and then so is it."""
    if not weight.is_contiguous() and weight.T.is_contiguous():
        return add_product(weight.T, A.T, B.T, scale).T
    if _suits_onednn(B, A):
        return _by_onednn(B, (A * scale).T).add_(weight)
    return torch.addmm(weight, B, A, alpha=scale)


def project(gradient: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of A and B from that of the matrix to which `scale · B A` is added."""
    gradient = gradient.to(A.dtype)
    return _scaled(A, B.T, gradient, scale), _scaled(B, gradient, A.T, scale)


def _scaled(shaped: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns `scale · left right`, shaped as the first argument is."""
    if _suits_onednn(left, right):
        return _by_onednn(left, right.T).mul_(scale)
    return torch.addmm(shaped, left, right, beta=0, alpha=scale)  # beta=0 leaves the first argument out


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def _suits_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
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
        and _has_wide_registers()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_grad_enabled()
    )


@functools.cache
def _has_wide_registers() -> bool:
    """Whether torch has oneDNN here, and the processor has what MKL leaves unused."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(available)
