"""A convolution with a low-rank update."""

from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation_compiled_by
from lora_plugins.kernels._path import may_form_effective_weight
from lora_plugins.kernels.compiled_conv import compiled_conv
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.update import Update
from lora_plugins.utils import in_full


@operation_compiled_by(compiled_conv)
def lora_conv(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, geometry: Geometry) -> Tensor:
    """Convolves `x` with `W` and the dropped `x` with `scaling · B A`.

    Args:
        x: `(batch, in, *size)`.
        weight: `(out, in / groups, *kernel_size)`.
        bias: `(out,)` or None.
        update: Of the weight as a matrix, whose rows are those of the kernel.
        geometry: How the kernel moves.
    """
    with in_full(weight):
        delta_weight = ((update.B * update.scaling) @ update.A).view(weight.shape)
    if may_form_effective_weight(weight, update.dropout):
        return geometry.convolve(x, (weight + delta_weight).to(weight.dtype), bias)
    dropped = F.dropout(x, update.dropout) if update.dropout else x
    return geometry.convolve(x, weight, bias) + geometry.convolve(dropped, delta_weight.to(weight.dtype))
