"""What the functions know besides their tensors, and how they are called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lora_plugins.errors import StateError
from lora_plugins.kernels.dropout import Dropout
from lora_plugins.kernels.recompute import Recompute
from lora_plugins.utils.autocast import autocast_dtype, in_full

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of x, A and B, where they are needed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is no tensor.

    Args:
        scaling: Factor of the update.
        dropout: The masks of the branch's input; None without dropout.
        update_first: Whether the update is added to the weight or kernel rather than to the output.
        small_products: Whether A and B get their gradients without that of the weight.
        again: Computes the input again, which is then not kept.
    """

    scaling: float
    dropout: Dropout | None
    update_first: bool
    small_products: bool
    again: Recompute | None

    @property
    def scale(self) -> float:
        """The scaling, and what makes up for dropped elements."""
        return self.scaling * (self.dropout.scale if self.dropout else 1.0)


def keep(ctx: Any, options: Options, x: Tensor, *others: Tensor | None) -> None:
    """Keeps what the backward needs, but not an input that can be computed again."""
    ctx.options = options
    ctx.save_for_backward(None if options.again else x, *others)
    if options.again:
        ctx.dtype, ctx.stride = x.dtype, x.stride()


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """Returns what `keep` was given.

    Raises:
        StateError: In a second derivative, if the input was not kept: it would be cut off from what it came from.
    """
    tensors: tuple[Tensor, ...] = ctx.saved_tensors
    if ctx.options.again is None:
        return tensors
    if torch.is_grad_enabled():
        raise StateError("memory='low' has no second derivative. Use memory='normal' for create_graph=True.")
    x = ctx.options.again().to(ctx.dtype)
    if x.stride() != ctx.stride:  # the order of a mask is that of the memory of its input
        x = x.new_empty_strided(x.shape, ctx.stride).copy_(x)
    return x, *tensors[1:]


def called(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Returns what calls a function.

    `Function.apply` itself first looks for wrappers of functorch, of which `is_eager` has said that there are none.
    """
    return cast(Callable[..., Tensor], super(torch.autograd.Function, function).apply)  # type: ignore[misc]


def apply(
    compute: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    options: Options,
) -> Tensor:
    """Computes the output; under autocast in its type, except that an update is added to a wide weight in full."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return compute(x, weight, bias, A, B, options)
    if not options.update_first:
        weight, A, B = weight.to(dtype), A.to(dtype), B.to(dtype)
    with in_full(x):
        return compute(x.to(dtype), weight, None if bias is None else bias.to(dtype), A, B, options)
