"""A convolution with a low-rank update."""

from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation_compiled_by
from lora_plugins.kernels._path import may_form_effective_weight
from lora_plugins.kernels.compiled_conv import compiled_conv
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.utils import in_full


@operation_compiled_by(compiled_conv)
def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    geometry: Geometry,
    *,
    low_memory: bool = False,
) -> Tensor:
    """Convolves `x` with `W` and the dropped `x` with `scaling · B A`.

    Args:
        x: `(batch, in, *size)`.
        weight: `(out, in / groups, *kernel_size)`.
        bias: `(out,)` or None.
        A: `(r, in / groups * kernel)`.
        B: `(out, r)`.
        scaling: Factor of the update.
        dropout: Probability of dropping an element of the branch's input.
        geometry: How the kernel moves.
        low_memory: Whether a kernel may compute `x` again in the backward instead of saving it.
    """
    with in_full(weight):
        delta_weight = ((B * scaling) @ A).view(weight.shape)
    if may_form_effective_weight(weight, dropout):
        return geometry.convolve(x, (weight + delta_weight).to(weight.dtype), bias)
    dropped = F.dropout(x, dropout) if dropout else x
    return geometry.convolve(x, weight, bias) + geometry.convolve(dropped, delta_weight.to(weight.dtype))
