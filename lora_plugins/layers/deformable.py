"""Deformable convolutions of torchvision, whose kernel is applied at positions that a second input gives.

Source: Zhu et al., Deformable ConvNets v2: More Deformable, Better Results, arXiv 1811.11168.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lora_plugins.layers.conv import convolved_apart
from lora_plugins.plugins import BranchUse, RowMajorPlugin, Slot, StackedAdapters, Term, add_updates
from lora_plugins.utils import in_full

if TYPE_CHECKING:
    from torchvision.ops import DeformConv2d


class DeformConv2dPlugin(RowMajorPlugin["DeformConv2d"]):
    """`torchvision.ops.DeformConv2d`, with the layout of a convolution: A is (r, in/groups · k · k), B is (out, r)."""

    name = "deform_conv2d"
    module_type = "torchvision.ops.deform_conv.DeformConv2d"
    branch_types: ClassVar = ("torchvision.ops.deform_conv.DeformConv2d",)
    branch_use: ClassVar[BranchUse] = "dropout"
    branch_takes_delta = True

    def inputs(
        self, layer: "DeformConv2d", slot: Slot, x: Tensor, offset: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the sampled patches that the kernel meets, of all groups together; x is `(n, channels, ...)`."""
        shape = layer.weight.shape[1:]
        picks = torch.eye(shape.numel(), dtype=x.dtype, device=x.device).view(-1, *shape)
        patches = _convolved(layer, x, picks.repeat(layer.groups, 1, 1, 1), None, offset, mask)
        positions = patches.view(len(x), layer.groups, shape.numel(), -1)
        return positions.movedim(2, -1).flatten(0, -2)

    def branch(
        self,
        layer: "DeformConv2d",
        base: Mapping[str, Tensor],
        terms: Sequence[Term],
        x: Tensor,
        offset: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Convolves `x` with the untouched kernel, and the dropped `x` with each update."""
        convolve = partial(_convolved, layer, offset=offset, mask=mask)
        return convolved_apart(self, convolve, x, base["weight"], layer.bias, terms)

    def mixed(
        self,
        layer: "DeformConv2d",
        base: Mapping[str, Tensor],
        adapters: StackedAdapters,
        x: Tensor,
        offset: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Convolves each image with its own update, one after the other."""
        weight = base["weight"]
        bias = layer.bias if adapters.factors is None else None  # which has no factor
        A, B = adapters.A[adapters.index], adapters.B[adapters.index]
        with in_full(A):
            kernels = (B @ A).view(-1, *weight.shape)
        given = [torch.split(each.to(A.dtype), 1) for each in (x, offset, mask) if each is not None]
        updates = [
            _convolved(layer, row, kernel, None, *own) for kernel, row, *own in zip(kernels, *given, strict=True)
        ]
        y = add_updates(_convolved(layer, x, weight, bias, offset, mask), [torch.cat(updates)])
        return adapters.rescale(y, layer.bias, 1)


def _convolved(
    layer: "DeformConv2d", x: Tensor, kernel: Tensor, bias: Tensor | None, offset: Tensor, mask: Tensor | None = None
) -> Tensor:
    from torchvision.ops import deform_conv2d  # noqa: PLC0415 -- the layer is of it, and the core does without

    y: Tensor = deform_conv2d(
        x, offset, kernel, bias, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, mask=mask
    )
    return y
