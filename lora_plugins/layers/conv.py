"""Convolutions of one to three dimensions, plain and transposed, with any stride, padding, dilation and groups.

The update is one kernel in the layout of the layer's own weight, so every option of the layer holds by construction:
ΔW = scaling · B·A, with A of shape (r, in/groups · k…) and B of shape (out, r). A transposed convolution keeps its
inputs first, so there the matrix is transposed: A is (r, in) and B is (out/groups · k…, r).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.layer_plugin import BranchUse, ColumnMajorPlugin, RowMajorPlugin, Term


class _ConvPlugin(RowMajorPlugin):
    branch_use: ClassVar[BranchUse] = "dropout"

    def branch(self, layer: nn.Module, base: Mapping[str, Tensor | None], terms: Sequence[Term], x: Tensor) -> Tensor:
        """Convolves `x` with the untouched kernel, and the dropped `x` with each update."""
        weight = base["weight"]
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        assert weight is not None
        y: Tensor = layer._conv_forward(x, weight, layer.bias)
        for term in terms:
            kernel = self.from_matrix(term.matrix(), weight.shape).to(weight.dtype)
            y = y + layer._conv_forward(term.drop(x), kernel, None)
        return y


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


class _ConvTransposePlugin(ColumnMajorPlugin):
    branch_use: ClassVar[BranchUse] = "dropout"
    dimensions: ClassVar[int]

    def branch(
        self,
        layer: nn.Module,
        base: Mapping[str, Tensor | None],
        terms: Sequence[Term],
        x: Tensor,
        output_size: list[int] | None = None,
    ) -> Tensor:
        """Convolves `x` with the untouched kernel, and the dropped `x` with each update."""
        weight = base["weight"]
        assert isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        assert weight is not None
        convolve = getattr(F, f"conv_transpose{self.dimensions}d")
        padding = layer._output_padding(
            x,
            output_size,
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.kernel_size,  # type: ignore[arg-type]
            self.dimensions,
            layer.dilation,  # type: ignore[arg-type]
        )
        options = (layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        y: Tensor = convolve(x, weight, layer.bias, *options)
        for term in terms:
            kernel = self.from_matrix(term.matrix(), weight.shape).to(weight.dtype)
            y = y + convolve(term.drop(x), kernel, None, *options)
        return y


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
