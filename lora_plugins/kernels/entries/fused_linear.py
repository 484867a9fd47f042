"""A linear layer with a low-rank update as one autograd function.

Two paths to the same law, chosen by their arithmetic (as in RunLoRA, Cherniuk et al., arXiv 2312.03415): add the update
to the weight first, which costs `out · in · r` whatever the number of rows, or add the small products to the output.
Only `x` is saved for the backward; effective weight, small products and dropout mask are computed again. Under autocast
the effective weight is saved, too, where a plain layer saves its own weight in the type that autocast computes in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._autograd import (
    Gradients,
    Options,
    call_under_autocast,
    law_gradients,
    recomputation,
    save,
    saved,
)
from lora_plugins.kernels._channels import as_rows
from lora_plugins.kernels._eager import applies_in_eager_mode, eager_is_unknown, raw_apply
from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels._path import Path, effective_weight_is_cheaper, may_form_effective_weight
from lora_plugins.kernels.dropout import Dropout, dropped_parts, part_of, sum_of_parts
from lora_plugins.kernels.matmul import effective_weight, factor_gradients, linear_2d, matmul, transposed_product

Matrix = Callable[[], Tensor]
"""Returns what the rows were multiplied by: W, or the effective weight."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions(Options):
    """Options of a linear layer.

    Args:
        axis: Of the inputs in `x`: the last one, or 1 in images.
        low_memory: Whether nothing is saved that can be computed again.
    """

    axis: int
    low_memory: bool


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    *,
    axis: int = -1,
    low_memory: bool = False,
) -> Tensor:
    """Computes `x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`."""
    options = LinearOptions(
        scaling=scaling,
        dropout=Dropout.draw(dropout) if dropout else None,
        path=choose_path(x.numel() // x.shape[axis], weight, A, dropout),
        recompute_input=recomputation(x) if low_memory else None,
        axis=axis,
        low_memory=low_memory,
    )
    return call_under_autocast(_lora_linear, x, weight, bias, A, B, options)


def choose_path(rows: int, weight: Tensor, A: Tensor, dropout: float) -> Path:
    """Returns how output and gradients of some rows are computed, by what has less arithmetic."""
    effective_weight_first = effective_weight_is_cheaper(rows, *weight.shape) and may_form_effective_weight(
        weight, dropout
    )
    return Path(effective_weight_first, not effective_weight_first or not _rank_is_high(rows, weight, A))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: LinearOptions
    ) -> Tensor:
        rows, rounded = as_rows(x, options.axis), None
        if options.path.effective_weight_first:
            effective = effective_weight(weight, A, B, options.scale, x.dtype)
            y = linear_2d(rows, effective, bias)
            if ctx.needs_input_grad[0] and x.dtype != weight.dtype and not options.low_memory:
                rounded = effective
        else:
            y = _with_products(rows, weight, bias, A, B, options)
        save(ctx, options, x, weight, bias, A, B, rounded)
        return _from_rows(y, x, options.axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, rounded = saved(ctx)
        options: LinearOptions = ctx.options
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *law_gradients(_law(options), (x, weight, bias, A, B), needed, gradient), None
        rows, dy = as_rows(x, options.axis), as_rows(gradient, options.axis)

        def matrix() -> Tensor:
            """What the rows were multiplied by."""
            if rounded is not None:
                return rounded
            if options.path.effective_weight_first:
                return effective_weight(weight, A, B, options.scale, dy.dtype)
            return weight

        dx, dA, dB = _GRADIENTS[options.path](rows, dy, matrix, A, B, options, needed)
        return (
            None if dx is None else _laid_out_like(x, _from_rows(dx, x, options.axis)),
            transposed_product(dy, rows) if needed[1] else None,
            dy.sum(0) if needed[2] else None,
            dA,
            dB,
            None,
        )


_lora_linear = raw_apply(_LoraLinear)


def _with_dimensions_of(x: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Returns rows with the dimensions of the input; a view."""
    return rows.view(*x.movedim(axis, -1).shape[:-1], rows.shape[1]).movedim(-1, axis)


def _from_rows(rows: Tensor, x: Tensor, axis: int) -> Tensor:
    """Gives fresh rows the dimensions of the input."""
    # In place, so as not to be a view: autograd would refuse to let what follows, as ReLU(inplace=True), write into it.
    if axis == -1:
        return rows.resize_(*x.shape[:-1], rows.shape[1])
    return rows.resize_(len(x), rows.shape[1], *x.shape[2:], memory_format=torch.channels_last)


def _laid_out_like(x: Tensor, gradient: Tensor) -> Tensor:
    """Returns a gradient in the memory format of its tensor.

    Operations take it from each other, and torch's batch normalization (2.13, on a CPU) is wrong without a word where
    input and gradient are of two formats and a dimension is 1.
    """
    return gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)


def _with_products(rows: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: Options) -> Tensor:
    """The output where the small products are added to it."""
    y = linear_2d(rows, weight, bias)
    for part, some, _ in dropped_parts(rows, A.dtype, options.dropout, masks=False):
        _accumulate(part_of(y, part), linear_2d(some, A), B.T, options.scale)
    return y


def _accumulate(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Adds `scale · left right` to a target, whose type may be another one."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=scale)
    else:
        target.add_(left @ right, alpha=scale)


def _through_gradient(
    rows: Tensor, dy: Tensor, matrix: Matrix, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B from that of the effective weight."""
    dA = dB = None
    if needed[3] or needed[4]:
        dA, dB = factor_gradients(transposed_product(dy, rows), A, B, options.scale)
    return matmul(dy, matrix()) if needed[0] else None, dA, dB


def _through_both(
    rows: Tensor, dy: Tensor, matrix: Matrix, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradient of x from the effective weight, those of A and B from small products."""
    dx = dA = dB = None
    if needed[4]:
        dB = transposed_product(linear_2d(rows, (A * options.scale).to(rows.dtype)), dy).T
    if needed[3]:
        dA = transposed_product(matmul(dy, (B * options.scale).to(dy.dtype)), rows)
    if needed[0]:  # last, so that it is still in the caches when the layer before wants it
        dx = matmul(dy, matrix())
    return dx, dA, dB


def _through_products(
    rows: Tensor, dy: Tensor, matrix: Matrix, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B where the small products were added to the output."""
    dx = matmul(dy, matrix()) if needed[0] else None
    of_A, of_B, scaled_A, scaled_B = [], [], A * options.scale, B * options.scale
    for part, x, mask in dropped_parts(rows, A.dtype, options.dropout, masks=True):
        some_dy = part_of(dy, part).to(B.dtype)
        of_B.append(matmul(linear_2d(scaled_A, x), some_dy).T)
        g = matmul(some_dy, scaled_B)
        of_A.append(transposed_product(g, x))
        if dx is not None and mask is not None:
            part_of(dx, part).addcmul_(torch.mm(g, A, out=x), mask)
        elif dx is not None:
            _accumulate(dx, g, A)
    return dx, sum_of_parts(of_A) if needed[3] else None, sum_of_parts(of_B) if needed[4] else None


_GRADIENTS: dict[Path, Callable[..., Gradients]] = {
    Path(effective_weight_first=True, small_products=False): _through_gradient,
    Path(effective_weight_first=True, small_products=True): _through_both,
    Path(effective_weight_first=False, small_products=True): _through_products,
}


def _rank_is_high(rows: int, weight: Tensor, A: Tensor) -> bool:
    """Whether the gradient of the whole weight, from which A and B get theirs, costs less than small products."""
    (r, inputs), outputs = A.shape, len(weight)
    return rows * inputs * outputs + 2 * r * inputs * outputs < 2 * rows * r * (inputs + outputs)


def _law(options: LinearOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = as_rows(x, options.axis)
        some = rows if options.dropout is None else rows * options.dropout.mask_like(rows)
        y = F.linear(rows, weight.to(x.dtype), bias)
        y = y + (options.scale * F.linear(F.linear(some.to(A.dtype), A), B)).to(y.dtype)
        return _with_dimensions_of(x, y, options.axis)

    return law


KERNELS = (Kernel("fused_linear", "lora_linear", eager_is_unknown, applies_in_eager_mode, fused_linear),)
