"""The output of a layer, kept for its backward by a function behind it, and what a rescaled layer learns from it.

Where what follows keeps the output, too, as an activation or attention does, both keep the same memory. What follows
may also write into it, as `ReLU(inplace=True)` does: the layer then has to do without, which autograd would refuse if
the layer itself had saved its output.
"""

from typing import Any

import torch
from torch import Tensor

from lora_plugins.kernels._eager import raw_apply

_ROWS = 64
"""Rows of an output by which it is told how much of it is bias."""

_LARGEST_BIAS = 16.0
"""An output may be so many times what it is without the bias: that loses as many units in the last place."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


class KeptOutput:
    """The output of one call, which is there in the backward of the layer, unless it was written into meanwhile.

    Autograd does not see every such write: not those through `y.data`, the outputs of `unsafe_chunk`, or arrays of
    NumPy, nor collective operations of processes. What the bits of each row add up to tells of them.
    """

    def __init__(self) -> None:
        self._output: Tensor | None = None
        self._sums: Tensor | None = None

    def keep(self, y: Tensor) -> Tensor:
        """Returns the output; where it has a gradient, it is kept."""
        if not y.requires_grad:
            return y
        self._sums = _sums_of_bits(y.detach())
        return _keep(y, self)  # type: ignore[no-any-return]

    def put(self, y: Tensor | None) -> None:
        """Takes the output as it was saved, and as hooks of saved tensors return it."""
        self._output = y if y is not None and self._is_as_it_was(y) else None

    def take(self) -> Tensor | None:
        """Returns the output, if it is as it was, and keeps it no longer."""
        y, self._output = self._output, None
        return y

    def _is_as_it_was(self, y: Tensor) -> bool:
        assert self._sums is not None
        is_there = y.untyped_storage().nbytes() >= y.nbytes  # some free the memory of what no operation has saved
        return is_there and torch.equal(_sums_of_bits(y), self._sums)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: KeptOutput) -> Tensor:
        ctx.kept = kept
        ctx.mark_dirty(y)  # it is returned as it is, and not as a view, into which nothing may write
        ctx.save_for_backward(y.detach())  # hooks hold what they are given, and `y.data` may be put in another place
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        try:
            (y,) = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            y = None
        ctx.kept.put(y)
        return gradient, None


_keep = raw_apply(_Keep)


def _sums_of_bits(y: Tensor) -> Tensor:
    """Returns for each row what its numbers add up to as integers, which takes one pass and is never rounded."""
    integer = _INTEGERS[y.element_size()]
    return y.view(integer).sum(-1, dtype=integer)


def tells_rescaling(y: Tensor, bias: Tensor | None, factors: Tensor) -> bool:
    """Whether an output on a CPU is precise without its bias and what rescales it: for each column, by some rows.

    Args:
        y: `(rows, out)`.
        bias: `(out,)` or None.
        factors: `f`, `(out,)`.
    """
    some = y[:: max(1, len(y) // _ROWS)].to(factors.dtype)
    whole = some.abs().sum(0)
    rest = whole if bias is None else (some - bias).abs_().sum(0)
    smallest = torch.finfo(factors.dtype).tiny / torch.finfo(factors.dtype).eps  # below it, numbers have fewer digits
    is_told = rest * _LARGEST_BIAS > whole + smallest
    return bool(is_told.all())


def gradient_of_factors(dy: Tensor, y: Tensor, bias: Tensor | None, factors: Tensor) -> Tensor:
    """Returns the gradient of `f` in `y = f · (x Vᵀ) + b`, for fixed `V`: the sum of `dy · (y - b) / f` over rows.

    Args:
        dy: `(rows, out)`, the gradient of the output.
        y: `(rows, out)`.
        bias: `(out,)` or None.
        factors: `f`, `(out,)`, none of them zero.
    """
    products = dy * y if bias is None else (y - bias).mul_(dy)  # the bias first: sums that nearly cancel are not exact
    return products.sum(0) / factors
