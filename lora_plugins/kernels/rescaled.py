"""A layer whose weight is updated and its rows rescaled, as by DoRA: `f · (W + scaling · B A)`, `f` a number for each.

The direction `W + scaling · B A` is formed for the output anyway, since a batch has more positions than a weight has
rows. What the rows are rescaled by is a function of that very matrix: its norms, say, cost one pass over it, are exact
where the update nearly cancels the weight, and need no cached norms of the base.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.update import Rescaling, Update
from lora_plugins.utils import common_type, in_full


def rescaled_weight(weight: Tensor, update: Update, rescaling: Rescaling) -> Tensor:
    """Returns `f · (W + scaling · B A)`, `(out, in)` as W is, in plain operations and the wider type of W and A."""
    direction, factors = direction_and_factors(weight, update, rescaling)
    return factors[:, None] * direction


def direction_and_factors(weight: Tensor, update: Update, rescaling: Rescaling) -> tuple[Tensor, Tensor]:
    """Returns `W + scaling · B A`, `(out, in)`, and `f`, `(out,)`; arguments as those of `rescaled_weight`."""
    wide = common_type(weight.dtype, update.A.dtype)
    direction = torch.addmm(weight.to(wide), update.B.to(wide), update.A.to(wide), alpha=update.scaling)
    return direction, rescaling.factors(direction.detach(), *rescaling.own)


@operation
def lora_rescaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: Update,
    rescaling: Rescaling,
    geometry: Geometry | None,
) -> Tensor:
    """Computes with `W' = f · (W + scaling · B A)`; with dropout, `x` with `W` and the dropped `x` with `W' - W`.

    Args:
        x: `(..., in)`, or images `(batch, in, *size)`.
        weight: `(out, in)`, or the kernel of a convolution.
        bias: `(out,)` or None.
        update: Of the weight as a matrix.
        rescaling: Of its rows.
        geometry: How a kernel moves; None in a linear layer.
    """
    apply = F.linear if geometry is None else geometry.convolve
    with in_full(weight):
        whole = rescaled_weight(weight.flatten(1), update, rescaling).view(weight.shape)
    if not update.dropout:
        return apply(x, whole.to(weight.dtype), bias)
    delta = (whole - weight).to(weight.dtype)
    return apply(x, weight, bias) + apply(F.dropout(x, update.dropout), delta)
