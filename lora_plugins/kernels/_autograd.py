"""What the functions with a hand-written gradient have in common."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lora_plugins.errors import StateError
from lora_plugins.kernels._operation import operation
from lora_plugins.kernels._path import Path
from lora_plugins.kernels.dropout import Dropout, without_gaps
from lora_plugins.kernels.update import Update
from lora_plugins.utils import autocast_dtype, in_full

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of x, A and B, where they are needed."""

Recompute = Callable[[], Tensor]


@operation
def recomputation(x: Tensor) -> Recompute | None:
    """Returns what computes the input of an adapted layer again in the backward; None if it has to be saved itself."""
    return None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything about a call that is not a tensor.

    Args:
        scaling: Factor of the update.
        dropout: The masks of the branch's input; None without dropout.
        path: How output and gradients are computed.
        low_memory: Whether nothing is saved that can be computed again.
        recompute_input: Computes the input again, which is then not saved.
    """

    scaling: float
    dropout: Dropout | None
    path: Path
    low_memory: bool = False
    recompute_input: Recompute | None = None

    @classmethod
    def of_call(cls, update: Update, x: Tensor, path: Path, **own: Any) -> Self:
        """Returns the options of a call: draws the masks, and asks whether the input can be computed again."""
        return cls(
            scaling=update.scaling,
            dropout=Dropout.draw(update.dropout) if update.dropout else None,
            path=path,
            low_memory=update.low_memory,
            recompute_input=recomputation(x) if update.low_memory else None,
            **own,
        )

    @property
    def scale(self) -> float:
        """The scaling, and what makes up for dropped elements."""
        return self.scaling * (self.dropout.scale if self.dropout else 1.0)


def save(ctx: Any, options: Options, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None) -> None:
    """Saves what the backward needs, except an input that can be computed again.

    torch refuses a backward when a saved tensor has changed. A bias may change, as no gradient depends on it, so it is
    kept in the context. Of a frozen weight, the values are saved: those of the forward, whatever `weight.data` is then.
    """
    ctx.options, ctx.bias = options, bias
    ctx.dtype, ctx.stride = x.dtype, x.stride()
    own = weight if ctx.needs_input_grad[1] else weight.detach()
    ctx.save_for_backward(None if options.recompute_input else x, own, *others)


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """Returns the tensors that `save` was given, without the bias; with dropout, the input in the layout that it had.

    Raises:
        StateError: In a second derivative, if the input was not saved: it would be cut off from what it came from.
    """
    x, *others = ctx.saved_tensors
    if ctx.options.recompute_input is not None:
        if torch.is_grad_enabled():
            raise StateError("memory='low' has no second derivative. Use memory='normal' for create_graph=True.")
        x = ctx.options.recompute_input().to(ctx.dtype).requires_grad_(ctx.needs_input_grad[0])
    # Hooks of saved tensors may change the layout in memory, by which masks have their order.
    if ctx.options.dropout is not None and x.stride() != ctx.stride:
        x = x.new_empty_strided(x.shape, ctx.stride).copy_(x)
    return x, *others


def call_under_autocast(
    compute: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: Update,
    options: Options,
) -> Tensor:
    """Computes the output; under autocast in its type, except that an update is added to a wide weight in full."""
    x = x if options.dropout is None else without_gaps(x)
    dtype = autocast_dtype(x)
    if dtype is None:
        return compute(x, weight, bias, update.A, update.B, options)
    given = rounded(dtype, x, weight, bias, update, in_full_weight=options.path.effective_weight_first)
    with in_full(x):
        return compute(*given, options)


def rounded(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, *, in_full_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Returns the tensors of a call as autocast rounds them, except a weight to which its update is added in full."""
    A, B = update.A, update.B
    if not in_full_weight:
        weight, A, B = weight.to(dtype), A.to(dtype), B.to(dtype)
    return x.to(dtype), weight, None if bias is None else bias.to(dtype), A, B


def backward_in_full(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Returns a backward that computes in the types of its forward, also where it is called under autocast.

    Autocast had its say in the forward, or was switched off there: it must not round what is computed again.
    """

    @functools.wraps(backward)
    def in_types_of_the_forward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with in_full(gradient):
            return backward(ctx, gradient)

    return in_types_of_the_forward


def law_gradients(
    law: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Returns the gradients of a law written in ordinary operations, themselves differentiable where they have to be.

    Of `inputs`, those that are not given, such as a bias, are None; `needed` says which need a gradient, and `gradient`
    is that of the output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: an input may itself come from another one, as where a layer is called on its own output.
        given = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        output = law(*given)
        wanted = [tensor for tensor, need in zip(given, needed, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=create_graph))
    return [next(found) if need else None for need in needed]
