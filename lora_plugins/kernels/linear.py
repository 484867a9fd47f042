"""A linear layer with a low-rank update."""

from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation_compiled_by
from lora_plugins.kernels.compiled_linear import compiled_linear
from lora_plugins.utils import autocast_dtype


@operation_compiled_by(compiled_linear)
def lora_linear(
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
) -> Tensor:
    """Computes `x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`.

    Args:
        x: `(..., in)`, or images `(batch, in, height, width)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        A: `(r, in)`.
        B: `(out, r)`.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of the branch's input.
        axis: Of the inputs in `x`, and of the outputs in the result, in whose memory they are innermost: -1, or 1 in
            images.
        low_memory: Whether a kernel may compute `x` again in the backward instead of saving it.
    """
    innermost = axis == -1
    x = x if innermost else x.movedim(axis, -1)
    dropped = F.dropout(x, dropout) if dropout else x
    if autocast_dtype(x) is None:  # autocast would choose the type itself
        dropped = dropped.to(A.dtype)
    y = F.linear(x, weight, bias)
    update = F.linear(F.linear(dropped, A), B) * scaling
    y = y + update.to(y.dtype)
    return y if innermost else y.movedim(-1, axis)
