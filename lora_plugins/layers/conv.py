"""Convolutions of one to three dimensions, plain and transposed, with any stride, padding, dilation and groups.

The update is one kernel in the layout of the layer's own weight, so every option of the layer holds by construction:
ΔW = scaling · B·A, with A of shape (r, in/groups · k…) and B of shape (out, r). A transposed convolution keeps its
inputs first, so there the matrix is transposed: A is (r, in) and B is (out/groups · k…, r).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.kernels import Geometry, lora_conv, lora_rescaled, rescaled_weight
from lora_plugins.plugins import (
    BranchUse,
    ColumnMajorPlugin,
    LayerPlugin,
    RowMajorPlugin,
    Slot,
    StackedAdapters,
    Term,
    add_delta,
    add_updates,
    joined,
)
from lora_plugins.utils import in_full

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class _ConvPlugin(RowMajorPlugin[Conv]):
    branch_use: ClassVar[BranchUse] = "always"
    branch_takes_delta = True
    branch_takes_rescaling = True

    def inputs(self, layer: Conv, slot: Slot, x: Tensor) -> Tensor:
        """Returns the patches that the kernel is applied to, of all groups together; x is `(n, channels, ...)`."""
        dimensions = len(layer.kernel_size)
        x = x if x.dim() == dimensions + 2 else x[None]
        x = _padded(layer, x)
        x = x.reshape(len(x), layer.groups, -1, *x.shape[2:])
        for axis, (size, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            x = x.unfold(3 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # (n, groups, channels, positions..., kernel...): the vectors run over channels and kernel.
        return x.movedim(2, 2 + dimensions).flatten(0, 1 + dimensions).flatten(1)

    def branch(self, layer: Conv, base: Mapping[str, Tensor], terms: Sequence[Term], x: Tensor) -> Tensor:
        """Convolves `x` with the updated kernel, or with the untouched one and the dropped `x` with each update."""
        weight = base["weight"]
        geometry = _geometry(layer) if x.ndim == weight.ndim else None
        if (rescaling := terms[0].rescaling) is not None and geometry is not None:
            return lora_rescaled(x, weight, layer.bias, terms[0], rescaling, geometry)
        with in_full(weight):
            terms = [_with_delta(term, self.to_matrix(weight)) for term in terms]
        joint = joined(terms) if geometry is not None else None
        if joint is not None and geometry is not None:
            return lora_conv(x, weight, layer.bias, joint, geometry)
        if not any(term.dropout for term in terms):
            y: Tensor = layer._conv_forward(x, self._updated(weight, terms), layer.bias)
            return y
        return convolved_apart(self, layer._conv_forward, x, weight, layer.bias, terms)

    def mixed(self, layer: Conv, base: Mapping[str, Tensor], adapters: StackedAdapters, x: Tensor) -> Tensor:
        """Convolves each image with its own update, all at once as groups of one image with many channels."""
        weight = base["weight"]
        bias = layer.bias if adapters.factors is None else None  # which has no factor
        A, B = adapters.A[adapters.index], adapters.B[adapters.index]
        padded = _padded(layer, x).to(A.dtype)
        kernels = B @ A if layer.groups > 1 else A  # A does not fit the input of all groups
        each = Geometry(layer.stride, (0,) * len(layer.stride), layer.dilation, layer.groups * len(x))
        update = each.convolve(padded.flatten(0, 1)[None], kernels.reshape(-1, *weight.shape[1:]))
        positions = update.shape[2:]
        update = update.view(len(x), -1, *positions)
        if layer.groups == 1:
            update = torch.bmm(B, update.flatten(2)).view(len(x), -1, *positions)
        y = add_updates(layer._conv_forward(x, weight, bias), [update])
        return adapters.rescale(y, layer.bias, 1)

    def mixing_problem(self, layer: Conv) -> str:
        """Returns why rows cannot be mixed: somebody gave the layer a convolution, which takes one kernel for all."""
        return "somebody replaced _conv_forward, which takes one kernel for all rows" if _is_replaced(layer) else ""

    def _updated(self, weight: Tensor, terms: Sequence[Term]) -> Tensor:
        with in_full(weight):
            for term in terms:
                weight = add_delta(weight, self.from_matrix(term.delta_weight(), weight.shape))
        return weight


def convolved_apart(
    plugin: LayerPlugin[Any],
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Sequence[Term],
) -> Tensor:
    """Convolves `x` with the untouched kernel, and the dropped `x` with each update; `convolve` takes a bias last."""
    kernels = [plugin.from_matrix(term.delta_weight(), weight.shape).to(weight.dtype) for term in terms]
    updates = [convolve(term.drop(x), kernel, None) for term, kernel in zip(terms, kernels, strict=True)]
    return add_updates(convolve(x, weight, bias), updates)


def _with_delta(term: Term, weight: Tensor) -> Term:
    """Returns an update with its `delta`, if a rescaling stands in its place."""
    if term.rescaling is None:
        return term
    return replace(term, rescaling=None, delta=rescaled_weight(weight, term, term.rescaling) - weight)


def _padded(layer: Conv, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _geometry(layer: Conv) -> Geometry | None:
    """Returns how the kernel moves; None where only the layer's own `_conv_forward` pads and moves it."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or _is_replaced(layer):
        return None
    return Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)


def _is_replaced(layer: Conv) -> bool:
    """Whether the layer has a method of its own to convolve by, for example with another padding."""
    own = layer.__dict__.get("_conv_forward")  # compilers find no function of a method that is of the class
    return own is not None and getattr(own, "__func__", None) is not type(layer)._conv_forward


class Conv1dPlugin(_ConvPlugin):
    """`torch.nn.Conv1d` and its subclasses."""

    name = "conv1d"
    module_type = nn.Conv1d
    branch_types: ClassVar = (nn.Conv1d,)


class Conv2dPlugin(_ConvPlugin):
    """`torch.nn.Conv2d` and its subclasses."""

    name = "conv2d"
    module_type = nn.Conv2d
    branch_types: ClassVar = (nn.Conv2d,)


class Conv3dPlugin(_ConvPlugin):
    """`torch.nn.Conv3d` and its subclasses."""

    name = "conv3d"
    module_type = nn.Conv3d
    branch_types: ClassVar = (nn.Conv3d,)


class TimmConv2dSamePlugin(_ConvPlugin):
    """`Conv2dSame` of timm: a convolution without padding of an input that is padded first."""

    name = "timm_conv2d_same"
    module_type = "timm.layers.conv2d_same.Conv2dSame"
    branch_types: ClassVar = ("timm.layers.conv2d_same.Conv2dSame",)

    def inputs(self, layer: Conv, slot: Slot, x: Tensor) -> Tensor:
        """Returns the patches that the kernel is applied to, in the padded `x`."""
        return super().inputs(layer, slot, _padded_to_same(layer, x))

    def branch(self, layer: Conv, base: Mapping[str, Tensor], terms: Sequence[Term], x: Tensor) -> Tensor:
        """Pads `x`, and convolves it as any convolution does."""
        return super().branch(layer, base, terms, _padded_to_same(layer, x))

    def mixed(self, layer: Conv, base: Mapping[str, Tensor], adapters: StackedAdapters, x: Tensor) -> Tensor:
        """Pads the images, and convolves each with its own update."""
        return super().mixed(layer, base, adapters, _padded_to_same(layer, x))


def _padded_to_same(layer: Conv, x: Tensor) -> Tensor:
    """Pads as TensorFlow's `same` does: for `ceil(size / stride)` positions, and more at the end than at the start."""
    padding: list[int] = []
    for size, kernel, stride, dilation in zip(
        x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        reach = (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1
        missing = max(reach - size, 0)
        padding = [missing // 2, missing - missing // 2, *padding]  # torch begins with the last dimension
    return F.pad(x, padding)


class _ConvTransposePlugin(ColumnMajorPlugin[ConvTranspose]):
    branch_use: ClassVar[BranchUse] = "dropout"
    branch_takes_delta = True
    rows_are_outputs = False
    dimensions: ClassVar[int]

    def inputs(self, layer: ConvTranspose, slot: Slot, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Returns the channels at each position, which are laid on the output as kernels; x is `(n, channels, ...)`."""
        x = x if x.dim() == self.dimensions + 2 else x[None]
        return x.movedim(1, -1).flatten(0, -2)

    def branch(
        self,
        layer: ConvTranspose,
        base: Mapping[str, Tensor],
        terms: Sequence[Term],
        x: Tensor,
        output_size: list[int] | None = None,
    ) -> Tensor:
        """Convolves `x` with the untouched kernel, and the dropped `x` with each update."""
        weight = base["weight"]
        padding = layer._output_padding(
            x,
            output_size,
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.kernel_size,  # type: ignore[arg-type]
            self.dimensions,
            layer.dilation,  # type: ignore[arg-type]
        )
        convolve = partial(  # a function in here would have annotations, whose unions torch 2.8 cannot compile
            getattr(F, f"conv_transpose{self.dimensions}d"),
            stride=layer.stride,
            padding=layer.padding,
            output_padding=padding,
            groups=layer.groups,
            dilation=layer.dilation,
        )
        return convolved_apart(self, convolve, x, weight, layer.bias, terms)


class ConvTranspose1dPlugin(_ConvTransposePlugin):
    """`torch.nn.ConvTranspose1d` and its subclasses."""

    name = "conv_transpose1d"
    module_type = nn.ConvTranspose1d
    branch_types: ClassVar = (nn.ConvTranspose1d,)
    dimensions = 1


class ConvTranspose2dPlugin(_ConvTransposePlugin):
    """`torch.nn.ConvTranspose2d` and its subclasses."""

    name = "conv_transpose2d"
    module_type = nn.ConvTranspose2d
    branch_types: ClassVar = (nn.ConvTranspose2d,)
    dimensions = 2


class ConvTranspose3dPlugin(_ConvTransposePlugin):
    """`torch.nn.ConvTranspose3d` and its subclasses."""

    name = "conv_transpose3d"
    module_type = nn.ConvTranspose3d
    branch_types: ClassVar = (nn.ConvTranspose3d,)
    dimensions = 3
