"""How a layer computes the law: through the effective weight, or by small products that are added to its output."""

from typing import NamedTuple

import torch
from torch import Tensor


class Path(NamedTuple):
    """One way of computing the output and its gradients.

    The choice never depends on a clock, so that reruns, and all processes of a run on equal processors, compute the
    same bits.

    Args:
        effective_weight_first: Whether the output is that of `W + scale · B A`. Otherwise the update's own output is
            added to that of `W`.
        small_products: Whether A and B get their gradients from products with `r` columns, instead of from the gradient
            of the whole weight.
    """

    effective_weight_first: bool
    small_products: bool


def may_form_effective_weight(weight: Tensor, dropout: float) -> bool:
    """Whether the update may be added to the weight: not in half precision, where a small one is rounded away."""
    return not dropout and weight.dtype in (torch.float32, torch.float64)


def effective_weight_is_cheaper(rows: int, inputs: int, outputs: int) -> bool:
    """Whether `B A`, computed once, has less arithmetic than the small products of every row."""
    return rows * (inputs + outputs) > inputs * outputs
