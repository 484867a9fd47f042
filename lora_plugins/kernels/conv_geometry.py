"""How the kernel of a convolution moves over images, and the gradients that follow from it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._operation import operation

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""By the number of dimensions that a kernel moves in."""


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over the input; zeros are padded.

    Args:
        stride: Per dimension.
        padding: Per dimension, on both sides.
        dilation: Per dimension.
        groups: Number of groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolves `(batch, in, *size)` with `(out, in / groups, *kernel_size)`."""
        convolve = _CONVOLUTIONS[len(self.stride)]
        return convolve(x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
        self, dy: Tensor, x: Tensor, kernel: Tensor, *, of_x: bool, of_kernel: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of input and kernel."""
        fast = of_kernel and self.has_fast_gradient(x, kernel)
        dx, dkernel = self._backward(dy, x, kernel, of_x, of_kernel and not fast)
        return dx, kernel_gradient(x, kernel, self, dy) if fast else dkernel

    def has_fast_gradient(self, x: Tensor, kernel: Tensor) -> bool:
        """Whether a kernel of `kernel_gradient` computes it in place of torch's library."""
        return kernel_gradient.find(x, kernel, self) is not None

    def is_pointwise(self, kernel: Tensor) -> bool:
        """Whether the kernel sees one position at a time."""
        return kernel.shape[2:].numel() == 1 and not any(self.padding) and self.groups == 1

    def visible(self, x: Tensor) -> Tensor:
        """Returns the positions that a pointwise kernel sees; a view."""
        if max(self.stride) == 1:
            return x
        for axis, stride in enumerate(self.stride, start=2):
            x = x[(slice(None),) * axis + (slice(None, None, stride),)]
        return x

    def _backward(
        self, dy: Tensor, x: Tensor, kernel: Tensor, of_x: bool, of_kernel: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of input and kernel by torch's library."""
        dx, dkernel, _ = torch.ops.aten.convolution_backward.default(
            dy, x, kernel, None, self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups,
            (of_x, of_kernel, False),
        )  # fmt: skip
        return dx, dkernel


@operation
def kernel_gradient(x: Tensor, kernel: Tensor, geometry: Geometry, dy: Tensor) -> Tensor:
    """Returns the gradient of a kernel. Whether a kernel of this operation applies must not depend on `dy`.

    Args:
        x: The input, `(batch, in, *size)`.
        kernel: `(out, in / groups, *kernel_size)`.
        geometry: How the kernel moves.
        dy: The gradient of the output.
    """
    _, gradient = geometry._backward(dy, x, kernel, of_x=False, of_kernel=True)
    assert gradient is not None
    return gradient


def pointwise(dimensions: int) -> Geometry:
    """Returns how a kernel moves that sees one position at a time."""
    ones = (1,) * dimensions
    return Geometry(ones, (0,) * dimensions, ones, 1)
