"""A linear layer with a low-rank update as one operator for compilers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_plugins.kernels._autograd import Options
from lora_plugins.kernels._channels import as_rows
from lora_plugins.kernels._compiled import is_compiled_by, operands
from lora_plugins.kernels._products import choose_path, gradients, multiplied, output
from lora_plugins.kernels.dropout import Dropout
from lora_plugins.kernels.matmul import transposed_product
from lora_plugins.utils import in_full


def compiled_linear(
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
) -> Tensor | None:
    """Computes `lora_linear`; None for images, and where something other than `torch.compile` is at work."""
    one_block = weight.is_contiguous() or weight.T.is_contiguous()
    if axis != -1 or not one_block or not is_compiled_by("lora_linear", x, weight, bias, A, B):
        return None
    x, weight, bias, A, B, seed = operands(x, weight, bias, A, B, dropout)
    keep = torch.is_grad_enabled() and x.requires_grad and x.dtype != weight.dtype
    with in_full(x):
        y: Tensor = _linear(x, weight, bias, A, B, seed, scaling, dropout, keep)[0]
    return y


@torch.library.custom_op("lora_plugins::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and what the rows were multiplied by if that is to be kept."""
    rows = as_rows(x, -1)
    with torch.no_grad():
        y, matrix = output(rows, *_call(rows, weight, bias, A, B, seed, scaling, dropout))
        return y.resize_(*x.shape[:-1], len(weight)), matrix if keep else x.new_empty(0)


@torch.library.custom_op("lora_plugins::linear_gradients", mutates_args=())
def _linear_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None,
    kept: Tensor,
    scaling: float,
    dropout: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x, A and B that are needed."""
    rows = as_rows(x, -1)
    weight, _, left, right, options = _call(rows, weight, None, A, B, seed, scaling, dropout)

    def matrix() -> Tensor:
        return kept if kept.numel() else multiplied(dy.dtype, weight, left, right, options)

    with torch.no_grad():
        dx, dA, dB = gradients(rows, as_rows(dy, -1), matrix, left, right, options, needed)
    return (
        x.new_empty(0) if dx is None else dx.resize_(x.shape),
        A.new_empty(0) if dA is None else dA.to(A.dtype).contiguous(),
        B.new_empty(0) if dB is None else dB.to(B.dtype).contiguous(),
    )


def _call(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Options]:
    """What the rows meet: a wide weight is rounded to their type where the update is not added to it."""
    path = choose_path(len(rows), weight, A, dropout)
    if rows.dtype != weight.dtype and not path.effective_weight_first:
        weight, A, B = weight.to(rows.dtype), A.to(rows.dtype), B.to(rows.dtype)
    masks = None if seed is None else Dropout.of(dropout, int(seed))
    return weight, bias, A, B, Options(scaling=scaling, dropout=masks, path=path, recompute_input=None)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, keep = others
    kept = torch.empty_like(weight, dtype=x.dtype) if keep else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), kept


@_linear_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, needed = others
    return tuple(tensor.new_empty(tensor.shape if need else 0) for tensor, need in zip((x, A, B), needed, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, seed, *ctx.factors, _ = inputs
    ctx.save_for_backward(x, weight, A, B, seed, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, weight, A, B, seed, kept = ctx.saved_tensors
    of_x, of_weight, of_bias, of_A, of_B, *_ = ctx.needs_input_grad
    found = _linear_gradients(dy, x, weight, A, B, seed, kept, *ctx.factors, [of_x, of_A, of_B])
    dx, dA, dB = (each if need else None for each, need in zip(found, (of_x, of_A, of_B), strict=True))
    dy = as_rows(dy, -1)
    dW = transposed_product(dy, as_rows(x, -1)).to(weight.dtype) if of_weight else None
    return dx, dW, dy.sum(0) if of_bias else None, dA, dB, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)
