"""A linear layer with a low-rank update."""

from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation_compiled_by
from lora_plugins.kernels.compiled_linear import compiled_linear
from lora_plugins.kernels.update import Update
from lora_plugins.utils import autocast_dtype


@operation_compiled_by(compiled_linear)
def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, *, axis: int = -1) -> Tensor:
    """Computes `x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`.

    Args:
        x: `(..., in)`, or images `(batch, in, height, width)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        update: Of the weight.
        axis: Of the inputs in `x`, and of the outputs in the result, in whose memory they are innermost: -1, or 1 in
            images.
    """
    innermost = axis == -1
    x = x if innermost else x.movedim(axis, -1)
    dropped = F.dropout(x, update.dropout) if update.dropout else x
    if autocast_dtype(x) is None:  # autocast would choose the type itself
        dropped = dropped.to(update.A.dtype)
    y = F.linear(x, weight, bias)
    added = F.linear(F.linear(dropped, update.A), update.B) * update.scaling
    y = y + added.to(y.dtype)
    return y if innermost else y.movedim(-1, axis)
