"""Output and gradients of a linear layer with a low-rank update, on the rows of a matrix.

Two paths to the same law, chosen by their arithmetic (as in RunLoRA, Cherniuk et al., arXiv 2312.03415): add the update
to the weight first, which costs `out · in · r` whatever the number of rows, or add the small products to the output.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_plugins.kernels._autograd import Gradients, Options
from lora_plugins.kernels._path import Path, effective_weight_is_cheaper, may_form_effective_weight
from lora_plugins.kernels.dropout import add_dropped, dropped_parts, part_of, sum_of_parts
from lora_plugins.kernels.matmul import effective_weight, factor_gradients, linear_2d, matmul, transposed_product


def choose_path(rows: int, weight: Tensor, A: Tensor, dropout: float) -> Path:
    """Returns how output and gradients of some rows are computed, by what has less arithmetic."""
    effective_weight_first = effective_weight_is_cheaper(rows, *weight.shape) and may_form_effective_weight(
        weight, dropout
    )
    return Path(effective_weight_first, not effective_weight_first or not rank_is_high(rows, weight, A))


def rank_is_high(rows: int, weight: Tensor, A: Tensor) -> bool:
    """Whether the gradient of the whole weight, from which A and B get theirs, costs less than small products."""
    (r, inputs), outputs = A.shape, len(weight)
    return rows * inputs * outputs + 2 * r * inputs * outputs < 2 * rows * r * (inputs + outputs)


class State(NamedTuple):
    """What a backward has: the rows, what returns the matrix that they were multiplied by, A, B, and the options."""

    rows: Tensor
    matrix: Callable[[], Tensor]
    A: Tensor
    B: Tensor
    options: Options


def output(
    rows: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Returns `rows Wᵀ + b + scale · dropout(rows) Aᵀ Bᵀ`, and what the rows were multiplied by.

    Args:
        rows: `(rows, in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        A: `(r, in)`.
        B: `(out, r)`.
        options: Of the call.
    """
    matrix = multiplied(rows.dtype, weight, A, B, options)
    y = linear_2d(rows, matrix, bias)
    if not options.path.effective_weight_first:
        _add_products(y, rows, A, B, options)
    return y, matrix


def gradients(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of rows, A and B where they are needed, from that of the output, `(rows, out)`."""
    return _GRADIENTS[state.options.path](dy, state, needed)


def multiplied(dtype: torch.dtype, weight: Tensor, A: Tensor, B: Tensor, options: Options) -> Tensor:
    """Returns what rows of a type are multiplied by: W, or the effective weight."""
    return effective_weight(weight, A, B, options.scale, dtype) if options.path.effective_weight_first else weight


def _add_products(y: Tensor, rows: Tensor, A: Tensor, B: Tensor, options: Options) -> None:
    if _is_split(rows, A):
        of_A, of_B = _in_two(A), _in_two(B * options.scale)
        for part, some, _ in dropped_parts(rows, rows.dtype, options.dropout, masks=False):
            _add_split_products(part_of(y, part), some, of_A, of_B)
        return
    for part, some, _ in dropped_parts(rows, A.dtype, options.dropout, masks=False):
        _accumulate(part_of(y, part), linear_2d(some, A), B.T, options.scale)


def _is_split(rows: Tensor, A: Tensor) -> bool:
    """Whether wide factors meet rows of bfloat16 on a CPU, where products of their parts are faster than wide ones.

    Not on a GPU, where it was not measured, and parts of a sum may be added in bfloat16.
    """
    return rows.is_cpu and rows.dtype == torch.bfloat16 and A.dtype == torch.float32


def _add_split_products(y: Tensor, rows: Tensor, A: tuple[Tensor, Tensor], B: tuple[Tensor, Tensor]) -> None:
    """Adds `rows Aᵀ Bᵀ` to `y` with an error of some 2⁻¹⁶ of the products, by what is in bfloat16 throughout.

    Each wide number is the sum of two of bfloat16, whose products are added up in float32. What rounding takes from the
    first product is what the same product and its negative leave.
    """
    (A_high, A_low), (B_high, B_low) = A, B
    high, low = linear_2d(rows, torch.cat([A_high, A_low])).chunk(2, dim=1)
    low = low + torch.addmm(high, rows, A_high.T, beta=-1)
    y.addmm_(torch.cat([high, low, high], dim=1), torch.cat([B_high, B_high, B_low], dim=1).T)


def _in_two(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a tensor in bfloat16, and what rounding took from it."""
    high = wide.to(torch.bfloat16)
    return high, (wide - high).to(torch.bfloat16)


def _accumulate(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Adds `scale · left right` to a target, whose type may be another one."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=scale)
    else:
        target.add_(left @ right, alpha=scale)


def _through_gradient(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of x, A and B, from that of the effective weight."""
    rows, matrix, A, B, options = state
    dA = dB = None
    if needed[1] or needed[2]:
        dA, dB = factor_gradients(transposed_product(dy, rows), A, B, options.scale)
    return matmul(dy, matrix()) if needed[0] else None, dA, dB


def _through_both(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradient of x from the effective weight, and those of A and B from small products."""
    rows, matrix, A, B, options = state
    dx = dA = dB = None
    if needed[2]:
        dB = transposed_product(linear_2d(rows, (A * options.scale).to(rows.dtype)), dy).T
    if needed[1]:
        dA = transposed_product(matmul(dy, (B * options.scale).to(dy.dtype)), rows)
    if needed[0]:  # last, so that it is still in the caches when the layer before wants it
        dx = matmul(dy, matrix())
    return dx, dA, dB


def _through_products(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of x, A and B where the small products were added to the output."""
    rows, matrix, A, B, options = state
    dx = matmul(dy, matrix()) if needed[0] else None
    if _is_split(rows, A):  # what rounding takes from a gradient, its own type takes as well
        A, B = A.to(rows.dtype), B.to(rows.dtype)
    of_A, of_B, scaled_A, scaled_B = [], [], A * options.scale, B * options.scale
    for part, x, mask in dropped_parts(rows, A.dtype, options.dropout, masks=True):
        some_dy = part_of(dy, part).to(B.dtype)
        of_B.append(matmul(linear_2d(scaled_A, x), some_dy).T)
        g = matmul(some_dy, scaled_B)
        of_A.append(transposed_product(g, x))
        if dx is not None and mask is not None:
            add_dropped(part_of(dx, part), torch.mm(g, A, out=x), mask)
        elif dx is not None:
            _accumulate(dx, g, A)
    return dx, sum_of_parts(of_A) if needed[1] else None, sum_of_parts(of_B) if needed[2] else None


_GRADIENTS: dict[Path, Callable[[Tensor, State, Sequence[bool]], Gradients]] = {
    Path(effective_weight_first=True, small_products=False): _through_gradient,
    Path(effective_weight_first=True, small_products=True): _through_both,
    Path(effective_weight_first=False, small_products=True): _through_products,
}
