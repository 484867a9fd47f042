"""A linear layer with a low-rank update as one autograd function.

Only `x` is saved for the backward; effective weight, small products and dropout mask are computed again. Under autocast
the effective weight is saved, too, where a plain layer saves its own weight in the type that autocast computes in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._autograd import Options, backward_in_full, call_under_autocast, law_gradients, save, saved
from lora_plugins.kernels._channels import as_rows, gradient_of_rows
from lora_plugins.kernels._eager import applies_in_eager_mode, eager_is_unknown, needs_law, raw_apply
from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels._products import State, choose_path, gradients, multiplied, output
from lora_plugins.kernels.matmul import transposed_product
from lora_plugins.kernels.update import Update


@dataclass(frozen=True, kw_only=True)
class LinearOptions(Options):
    """Options of a linear layer.

    Args:
        axis: Of the inputs in `x`: the last one, or 1 in images.
    """

    axis: int


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, *, axis: int = -1) -> Tensor:
    """Computes `x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`."""
    path = choose_path(x.numel() // x.shape[axis], weight, update.A, update.dropout)
    options = LinearOptions.of_call(update, x, path, axis=axis)
    return call_under_autocast(_lora_linear, x, weight, bias, update, options)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: LinearOptions
    ) -> Tensor:
        rows = as_rows(x, options.axis)
        y, matrix = output(rows, weight, bias, A, B, options)
        ctx.steps = rows.stride()
        kept = ctx.needs_input_grad[0] and x.dtype != weight.dtype and not options.low_memory
        save(ctx, options, x, weight, bias, A, B, matrix if kept else None)
        return _from_rows(y, x, options.axis)

    @staticmethod
    @backward_in_full
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, rounded = saved(ctx)
        options: LinearOptions = ctx.options
        needed = ctx.needs_input_grad[:5]
        if needs_law(gradient):
            return *law_gradients(_law(options), (x, weight, ctx.bias, A, B), needed, gradient), None
        rows, dy = as_rows(x, options.axis), as_rows(gradient, options.axis)

        def matrix() -> Tensor:
            return multiplied(dy.dtype, weight, A, B, options) if rounded is None else rounded

        dx, dA, dB = gradients(dy, State(rows, matrix, A, B, options), (needed[0], *needed[3:]))
        return (
            None if dx is None else _with_dimensions_of(x, gradient_of_rows(ctx.steps, dx), options.axis),
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


def _law(options: LinearOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = as_rows(x, options.axis)
        some = rows if options.dropout is None else rows * options.dropout.mask_like(rows)
        y = F.linear(rows, weight.to(x.dtype), bias)
        y = y + (options.scale * F.linear(F.linear(some.to(A.dtype), A), B)).to(y.dtype)
        return _with_dimensions_of(x, y, options.axis)

    return law


KERNELS = (Kernel("fused_linear", "lora_linear", eager_is_unknown, applies_in_eager_mode, fused_linear),)
