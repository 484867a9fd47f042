"""A layer whose weight is updated and its rows rescaled, as by DoRA: `f · (W + scaling · B A)`, `f` a number for each.

The direction `W + scaling · B A` is formed for the output anyway, since a batch has more positions than a weight has
rows. What the rows are rescaled by is a function of that very matrix: its norms, say, cost one pass over it, are exact
where the update nearly cancels the weight, and need no cached norms of the base.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.utils import common_type, in_full

RowFactors = Callable[..., Tensor]
"""Returns `f`, `(out,)`, from the direction `(out, in)`, detached, and some tensors that `f` is differentiable in."""


def rescaled_weight(
    weight: Tensor, A: Tensor, B: Tensor, own: Sequence[Tensor], factors: RowFactors, scaling: float
) -> Tensor:
    """Returns `f · (W + scaling · B A)` in plain operations, in the wider type of W and A.

    Args:
        weight: `(out, in)`.
        A: `(r, in)`.
        B: `(out, r)`.
        own: What `factors` takes besides the direction.
        factors: What the rows are multiplied by.
        scaling: Factor of `B A`.
    """
    direction, found = direction_and_factors(weight, A, B, own, factors, scaling)
    return found[:, None] * direction


def direction_and_factors(
    weight: Tensor, A: Tensor, B: Tensor, own: Sequence[Tensor], factors: RowFactors, scaling: float
) -> tuple[Tensor, Tensor]:
    """Returns `W + scaling · B A`, `(out, in)`, and `f`, `(out,)`; arguments as those of `rescaled_weight`."""
    wide = common_type(weight.dtype, A.dtype)
    direction = torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling)
    return direction, factors(direction.detach(), *own)


@operation
def lora_rescaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    own: Sequence[Tensor],
    factors: RowFactors,
    geometry: Geometry | None,
    *,
    low_memory: bool = False,
) -> Tensor:
    """Computes with `W' = f · (W + scaling · B A)`; with dropout, `x` with `W` and the dropped `x` with `W' - W`.

    Args:
        x: `(..., in)`, or images `(batch, in, *size)`.
        weight: `(out, in)`, or the kernel of a convolution.
        bias: `(out,)` or None.
        A: `(r, in)`, where in counts the elements of a row of the weight.
        B: `(out, r)`.
        scaling: Factor of `B A`.
        dropout: Probability of dropping an element of the branch's input.
        own: What `factors` takes besides the direction.
        factors: What the rows are multiplied by.
        geometry: How a kernel moves; None in a linear layer.
        low_memory: Whether a kernel may compute `x` again in the backward instead of saving it.
    """
    apply = F.linear if geometry is None else geometry.convolve
    with in_full(weight):
        whole = rescaled_weight(weight.flatten(1), A, B, own, factors, scaling).view(weight.shape)
    if not dropout:
        return apply(x, whole.to(weight.dtype), bias)
    update = (whole - weight).to(weight.dtype)
    return apply(x, weight, bias) + apply(F.dropout(x, dropout), update)
