"""Products of matrices, which kernels may compute."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation
from lora_plugins.utils import common_type


@operation
def linear_2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x Wᵀ + b` of matrices: `(rows, out)` from `(rows, in)` and `(out, in)`."""
    return F.linear(x, weight, bias)


@operation
def add_scaled_product(matrix: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns `matrix + scale · left right`, of matrices of one type."""
    return torch.addmm(matrix, left, right, alpha=scale)


@operation
def scaled_product(shaped: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns `scale · left right`, shaped as the first argument is."""
    return torch.addmm(shaped, left, right, beta=0, alpha=scale)  # beta=0 leaves the first argument out


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left right`."""
    return linear_2d(left, right.T)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns `leftᵀ right`, of matrices with equally many rows."""
    # One of them has to be transposed in memory: the narrower one.
    return matmul(left.T, right) if left.shape[1] <= right.shape[1] else matmul(right.T, left).T


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns `W + scale · B A` as a matrix, rounded to a type once; transposed in memory if W is."""
    if weight.dtype == A.dtype == dtype:
        return _add_delta(weight, A, B, scale)
    wide = common_type(weight.dtype, A.dtype)
    return _add_delta(weight.to(wide), A.to(wide), B.to(wide), scale).to(dtype)


def factor_gradients(gradient: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of A and B from that of the matrix to which `scale · B A` is added."""
    gradient = gradient.to(A.dtype)
    return scaled_product(A, B.T, gradient, scale), scaled_product(B, gradient, A.T, scale)


def _add_delta(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    if not weight.is_contiguous() and weight.T.is_contiguous():
        return add_scaled_product(weight.T, A.T, B.T, scale).T
    return add_scaled_product(weight, B, A, scale)
