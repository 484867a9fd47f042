"""`x Wᵀ + b` with a low-rank update in one function.

Two ways of computing the same law, chosen by their arithmetic (as in RunLoRA, Cherniuk et al., arXiv 2312.03415): add
the update to the weight first, which costs `out · in · r` whatever the number of rows, or add the small products to the
output. Only `x` is kept for the backward; updated weight, small products and dropout mask are computed again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import channels
from lora_plugins.kernels.dropout import Dropout, dropped_parts, part_of, total
from lora_plugins.kernels.eager import law_gradients
from lora_plugins.kernels.matmul import add_product, contract, linear, matmul, project
from lora_plugins.kernels.options import Gradients, Options, apply, called, keep, kept
from lora_plugins.kernels.recompute import recomputation


@dataclass(frozen=True, kw_only=True)
class LinearOptions(Options):
    """What the function of a linear layer knows beside what all do.

    Args:
        axis: Of the inputs in `x`: the last one, or 1 in images.
    """

    axis: int


def lora_linear(
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
    """Computes `x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`.

    Args:
        x: `(..., in)`, or images `(batch, in, height, width)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        A: `(r, in)`.
        B: `(out, r)`.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of the branch's input.
        axis: Of the inputs in `x`, and of the outputs in the result, in whose memory they are innermost: -1, or 1 in
            images.
        low_memory: Whether `x` is computed again in the backward where it can be.
    """
    rows = x.numel() // x.shape[axis]
    update_first = update_is_cheaper(rows, *weight.shape) and may_go_first(weight, dropout)
    options = LinearOptions(
        scaling=scaling,
        dropout=Dropout.draw(dropout) if dropout else None,
        update_first=update_first,
        small_products=not update_first or not _rank_is_high(rows, A, B),
        again=recomputation(x) if low_memory else None,
        axis=axis,
    )
    return apply(_lora_linear, x, weight, bias, A, B, options)


def may_go_first(weight: Tensor, dropout: float) -> bool:
    """Whether the update may be added to the weight: not in half precision, where a small one is rounded away."""
    return not dropout and weight.dtype in (torch.float32, torch.float64)


def update_is_cheaper(rows: int, inputs: int, outputs: int) -> bool:
    """Whether `B A`, computed once, has less arithmetic than the small products of every row."""
    return rows * (inputs + outputs) > inputs * outputs


def updated(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns `W + scale · B A` as a matrix, rounded to a type once."""
    if weight.dtype == A.dtype == dtype:
        return add_product(weight, B, A, scale)
    wide = torch.promote_types(weight.dtype, A.dtype)
    return add_product(weight.to(wide), B.to(wide), A.to(wide), scale).to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: LinearOptions
    ) -> Tensor:
        keep(ctx, options, x, weight, bias, A, B)
        rows = channels.rows(x, options.axis)
        if options.update_first:
            y = linear(rows, updated(weight, A, B, options.scale, x.dtype), bias)
        else:
            y = _with_products(rows, weight, bias, A, B, options)
        return _from_rows(y, x, options.axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B = kept(ctx)
        options: LinearOptions = ctx.options
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *law_gradients(_law(options), (x, weight, bias, A, B), needed, gradient), None
        rows, dy = channels.rows(x, options.axis), channels.rows(gradient, options.axis)
        of_factors = _GRADIENTS[options.update_first, options.small_products]
        dx, dA, dB = of_factors(rows, dy, weight, A, B, options, needed)
        return (
            None if dx is None else _laid_out_like(x, _from_rows(dx, x, options.axis)),
            contract(dy, rows) if needed[1] else None,
            dy.sum(0) if needed[2] else None,
            dA,
            dB,
            None,
        )


_lora_linear = called(_LoraLinear)


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
    y = linear(rows, weight, bias)
    for part, some, _ in dropped_parts(rows, A.dtype, options.dropout, masks=False):
        _accumulate(part_of(y, part), linear(some, A), B.T, options.scale)
    return y


def _accumulate(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Adds `scale · left right` to a target, whose type may be another one."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=scale)
    else:
        target.add_(left @ right, alpha=scale)


def _through_gradient(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B from that of the updated weight."""
    dA = dB = None
    if needed[3] or needed[4]:
        dA, dB = project(contract(dy, rows), A, B, options.scale)
    return matmul(dy, updated(weight, A, B, options.scale, dy.dtype)) if needed[0] else None, dA, dB


def _through_both(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradient of x from the updated weight, those of A and B from small products."""
    dx = dA = dB = None
    if needed[4]:
        dB = contract(linear(rows, (A * options.scale).to(rows.dtype)), dy).T
    if needed[3]:
        dA = contract(matmul(dy, (B * options.scale).to(dy.dtype)), rows)
    if needed[0]:  # last, so that it is still in the caches when the layer before wants it
        dx = matmul(dy, updated(weight, A, B, options.scale, dy.dtype))
    return dx, dA, dB


def _through_products(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B where the small products were added to the output."""
    dx = matmul(dy, weight) if needed[0] else None
    of_A, of_B, scaled_A, scaled_B = [], [], A * options.scale, B * options.scale
    for part, x, mask in dropped_parts(rows, A.dtype, options.dropout, masks=True):
        some_dy = part_of(dy, part).to(B.dtype)
        of_B.append(matmul(linear(scaled_A, x), some_dy).T)
        g = matmul(some_dy, scaled_B)
        of_A.append(contract(g, x))
        if dx is not None and mask is not None:
            part_of(dx, part).addcmul_(torch.mm(g, A, out=x), mask)
        elif dx is not None:
            _accumulate(dx, g, A)
    return dx, total(of_A) if needed[3] else None, total(of_B) if needed[4] else None


_GRADIENTS: dict[tuple[bool, bool], Callable[..., Gradients]] = {
    (True, False): _through_gradient,
    (True, True): _through_both,
    (False, True): _through_products,
}


def _rank_is_high(rows: int, A: Tensor, B: Tensor) -> bool:
    """Whether the gradient of the whole weight, from which A and B get theirs, costs less than small products."""
    (r, inputs), outputs = A.shape, len(B)
    return rows * inputs * outputs + 2 * r * inputs * outputs < 2 * rows * r * (inputs + outputs)


def _law(options: LinearOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = channels.rows(x, options.axis)
        some = rows if options.dropout is None else rows * options.dropout.mask_like(rows)
        y = F.linear(rows, weight.to(x.dtype), bias)
        y = y + (options.scale * F.linear(F.linear(some.to(A.dtype), A), B)).to(y.dtype)
        return _with_dimensions_of(x, y, options.axis)

    return law
