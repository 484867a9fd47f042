"""`x Wᵀ + b` with a low-rank update in one function.

Two ways of computing the same law, chosen by their arithmetic (as in RunLoRA, Cherniuk et al., arXiv 2312.03415): add
the update to the weight first, which costs `out · in · r` whatever the number of rows, or add the small products to the
output. Only `x` is kept for the backward; updated weight, small products and dropout mask are computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.functions.eager import law_gradients
from lora_plugins.functions.masks import Dropout, dropped, dropped_and_mask
from lora_plugins.functions.options import Gradients, Options, apply, keep, kept
from lora_plugins.functions.products import contract, project
from lora_plugins.functions.recompute import recomputation


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    *,
    low_memory: bool = False,
) -> Tensor:
    """Computes `x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        A: `(r, in)`.
        B: `(out, r)`.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of the branch's input.
        low_memory: Whether `x` is computed again in the backward where it can be.
    """
    rows = x.numel() // x.shape[-1]
    update_first = update_is_cheaper(rows, *weight.shape) and may_go_first(weight, dropout)
    options = Options(
        scaling=scaling,
        dropout=Dropout.draw(dropout) if dropout else None,
        update_first=update_first,
        small_products=not update_first or not _rank_is_high(rows, A, B),
        again=recomputation(x) if low_memory else None,
    )
    return apply(_LoraLinear, x, weight, bias, A, B, options)


def may_go_first(weight: Tensor, dropout: float) -> bool:
    """Whether the update may be added to the weight: not in half precision, where a small one is rounded away."""
    return not dropout and weight.dtype in (torch.float32, torch.float64)


def update_is_cheaper(rows: int, inputs: int, outputs: int) -> bool:
    """Whether `B A`, computed once, has less arithmetic than the small products of every row."""
    return rows * (inputs + outputs) > inputs * outputs


def updated(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, *, beside: bool = False) -> Tensor:
    """Returns `W + scale · B A` as a matrix, with `scale · B` beside it if asked for, rounded to a type once."""
    outputs, inputs = weight.shape
    wide = torch.promote_types(weight.dtype, A.dtype)
    matrix = torch.empty(outputs, inputs + beside * B.shape[1], dtype=wide, device=weight.device)
    matrix[:, :inputs].copy_(weight).addmm_(B, A, alpha=scale)
    if beside:
        torch.mul(B, scale, out=matrix[:, inputs:])
    return matrix.to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: Options
    ) -> Tensor:
        keep(ctx, options, x, weight, bias, A, B)
        rows = x.reshape(-1, x.shape[-1])
        if options.update_first:
            y = F.linear(rows, updated(weight, A, B, options.scale, x.dtype), bias)
        else:
            y = _with_products(rows, weight, bias, A, B, options)
        # Not a view: autograd refuses to let what follows, such as ReLU(inplace=True), write into one.
        return cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B = kept(ctx)
        options: Options = ctx.options
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *law_gradients(_law(options), (x, weight, bias, A, B), needed, gradient), None
        rows, dy = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_factors = _GRADIENTS[options.update_first, options.small_products]
        dx, dA, dB = of_factors(rows, dy, weight, A, B, options, needed)
        return (
            None if dx is None else _laid_out_like(x, dx.view(x.shape)),
            dy.T @ rows if needed[1] else None,
            dy.sum(0) if needed[2] else None,
            dA,
            dB,
            None,
        )


def _laid_out_like(x: Tensor, gradient: Tensor) -> Tensor:
    """Returns a gradient in the memory format of its tensor; it may come as a part of a wider matrix.

    Operations take it from each other, and torch's batch normalisation (2.13, on a CPU) is wrong without a word where
    input and gradient are of two formats and a dimension is 1.
    """
    return gradient.contiguous() if x.is_contiguous() else torch.empty_like(x).copy_(gradient)


def _with_products(rows: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: Options) -> Tensor:
    """The output where the small products are added to it."""
    h = dropped(rows, A.dtype, options.dropout) @ A.T.contiguous()
    if _fits_beside(rows, weight, A):
        return F.linear(torch.cat([rows, h], 1), torch.cat([weight, B * options.scale], 1), bias)
    y = F.linear(rows, weight, bias)
    if y.dtype == h.dtype:
        return y.addmm_(h, B.T, alpha=options.scale)
    return y.add_((h @ B.T).mul_(options.scale).to(y.dtype))


def _through_gradient(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B from that of the updated weight."""
    dA = dB = None
    if needed[3] or needed[4]:
        dA, dB = project(dy.T @ rows, A, B, options.scale)
    return dy @ updated(weight, A, B, options.scale, dy.dtype) if needed[0] else None, dA, dB


def _through_both(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradient of x from the updated weight, those of A and B from small products."""
    dx = dA = dB = None
    if needed[4]:
        dB = contract(rows @ (A * options.scale).T.to(rows.dtype), dy).T
    if needed[0] and needed[3] and _fits_beside(dy, weight, A):
        dx, g = _parted(dy @ updated(weight, A, B, options.scale, dy.dtype, beside=True), A)
        return dx, contract(g, rows), dB
    if needed[3]:
        dA = contract(dy @ (B * options.scale).to(dy.dtype), rows)
    if needed[0]:  # last, so that it is still in the caches when the layer before wants it
        dx = dy @ updated(weight, A, B, options.scale, dy.dtype)
    return dx, dA, dB


def _through_products(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B where the small products were added to the output."""
    x, mask = dropped_and_mask(rows, A.dtype, options.dropout)
    dB = contract(x @ (A.T * options.scale).contiguous(), dy.to(B.dtype)).T
    dx = None
    if needed[0] and _fits_beside(dy, weight, A):
        dx, g = _parted(dy @ torch.cat([weight, B * options.scale], 1), A)
    else:
        dx = dy @ weight if needed[0] else None
        g = dy.to(B.dtype) @ (B * options.scale)
    dA = contract(g, x)
    if dx is not None and mask is not None:
        dx.addcmul_(torch.mm(g, A, out=x), mask)
    elif dx is not None:
        dx.add_(g @ A)
    return dx, dA if needed[3] else None, dB if needed[4] else None


_GRADIENTS: dict[tuple[bool, bool], Callable[..., Gradients]] = {
    (True, False): _through_gradient,
    (True, True): _through_both,
    (False, True): _through_products,
}


def _parted(both: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the columns of the large product and those of the small one beside it; views."""
    return both[:, : A.shape[1]], both[:, A.shape[1] :]


def _rank_is_high(rows: int, A: Tensor, B: Tensor) -> bool:
    """Whether the gradient of the whole weight, from which A and B get theirs, costs less than small products."""
    (r, inputs), outputs = A.shape, len(B)
    return rows * inputs * outputs + 2 * r * inputs * outputs < 2 * rows * r * (inputs + outputs)


def _fits_beside(rows: Tensor, weight: Tensor, A: Tensor) -> bool:
    """Whether a small product is cheaper as further columns of the large one than on its own.

    It saves a pass over the output and copies the weight and the input, so the output has to be the wider one.
    """
    outputs, inputs = weight.shape
    same_type = rows.dtype == weight.dtype == A.dtype
    return same_type and outputs > inputs and update_is_cheaper(len(rows), inputs, outputs)


def _law(options: Options) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        dropped = x if options.dropout is None else x * options.dropout.mask_like(x)
        y = F.linear(x, weight.to(x.dtype), bias)
        return y + (options.scale * F.linear(F.linear(dropped.to(A.dtype), A), B)).to(y.dtype)

    return law
