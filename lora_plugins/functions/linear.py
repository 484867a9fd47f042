"""`x Wᵀ + b` with a low-rank update in one function.

Two ways of computing the same law, chosen by their arithmetic (as in RunLoRA, Cherniuk et al., arXiv 2312.03415): add
the update to the weight first, which costs `out · in · r` whatever the number of rows, or add the small products to the
output. Only `x` is kept for the backward; updated weight, small products and dropout mask are computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.functions.eager import law_gradients
from lora_plugins.functions.masks import Dropout
from lora_plugins.functions.options import Gradients, Options, apply, keep, kept
from lora_plugins.functions.recompute import recomputation

CHUNK = 2**21
"""Bytes of input that are dropped at a time on a CPU: few enough to stay in its caches."""


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
    cheaper = update_is_cheaper(x.numel() // x.shape[-1], *weight.shape)
    options = Options(
        scaling=scaling,
        dropout=Dropout.draw(dropout) if dropout else None,
        update_first=cheaper and may_go_first(weight, dropout),
        again=recomputation(x) if low_memory else None,
    )
    return apply(_LoraLinear, x, weight, bias, A, B, options)


def may_go_first(weight: Tensor, dropout: float) -> bool:
    """Whether the update may be added to the weight: not in half precision, where a small one is rounded away."""
    return not dropout and weight.dtype in (torch.float32, torch.float64)


def update_is_cheaper(rows: int, inputs: int, outputs: int) -> bool:
    """Whether `B A`, computed once, has less arithmetic than the small products of every row."""
    return rows * (inputs + outputs) > inputs * outputs


def updated(weight: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Returns `W + scaling · B A` as a matrix, rounded to a type once."""
    return torch.addmm(weight, B, A, alpha=scaling).to(dtype)


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
            y = F.linear(rows, weight, bias)
            for chunk in _chunks(rows, A.dtype, options.dropout):
                _add_product(y[chunk.rows], (A @ chunk.dropped.T).T, B.T, options.scale)
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
        of_factors = _through_weight if options.update_first else _through_products
        dx, dA, dB = of_factors(rows, dy, weight, A, B, options, needed)
        return (
            None if dx is None else dx.view(x.shape),
            dy.T @ rows if needed[1] else None,
            dy.sum(0) if needed[2] else None,
            dA,
            dB,
            None,
        )


def _through_weight(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B where the update was added to the weight."""
    dx = dA = dB = None
    if needed[0]:
        dx = dy @ updated(weight, A, B, options.scale, dy.dtype)
    if needed[3]:
        dA = (B.T.to(dy.dtype) @ dy.T).mul_(options.scale) @ rows
    if needed[4]:
        dB = ((A.to(rows.dtype) @ rows.T).mul_(options.scale) @ dy).T
    return dx, dA, dB


def _through_products(
    rows: Tensor, dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: Options, needed: Sequence[bool]
) -> Gradients:
    """Gradients of x, A and B where the small products were added to the output."""
    dx = torch.empty_like(rows, dtype=A.dtype) if needed[0] else None
    dA, dB = torch.zeros_like(A), torch.zeros_like(B.T)
    for chunk in _chunks(rows, A.dtype, options.dropout):
        dy_chunk = dy[chunk.rows].to(B.dtype)
        g = (B.T @ dy_chunk.T).mul_(options.scale)
        if needed[3]:
            dA.addmm_(g, chunk.dropped)
        if needed[4]:
            dB.addmm_(A @ chunk.dropped.T, dy_chunk, alpha=options.scale)
        if dx is not None:
            torch.mm(g.T, A, out=dx[chunk.rows])
            chunk.drop_(dx[chunk.rows])
    if dx is not None:
        dx = _add_product(dx.to(dy.dtype), dy, weight, 1.0)
    return dx, dA if needed[3] else None, dB.T if needed[4] else None


@dataclass(frozen=True)
class _Chunk:
    """Some rows of the input, after dropout, in buffers that the next chunk overwrites."""

    rows: slice
    dropped: Tensor
    mask: Tensor | None

    def drop_(self, gradient: Tensor) -> None:
        """Drops what was dropped of the input."""
        if self.mask is not None:
            gradient.mul_(self.mask)


def _chunks(rows: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Iterator[_Chunk]:
    if dropout is None:
        yield _Chunk(slice(None), rows.to(dtype), None)
        return
    count, width = rows.shape
    size = max(8, CHUNK // (width * rows.element_size()) // 8 * 8) if rows.device.type == "cpu" else count
    masks = dropout.masks(rows.device)
    mask = torch.empty(min(size, count), width, dtype=dtype, device=rows.device)
    dropped = torch.empty_like(mask)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        length = part.stop - start
        masks.fill(mask[:length])
        torch.mul(rows[part], mask[:length], out=dropped[:length])
        yield _Chunk(part, dropped[:length], mask[:length])


def _add_product(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Adds `alpha · left @ right` to a fresh tensor, in place."""
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=alpha)
    return y.add_((left @ right).mul_(alpha).to(y.dtype))


def _law(options: Options) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        dropped = x if options.dropout is None else x * options.dropout.mask_like(x)
        y = F.linear(x, weight.to(x.dtype), bias)
        return y + (options.scale * F.linear(F.linear(dropped.to(A.dtype), A), B)).to(y.dtype)

    return law
