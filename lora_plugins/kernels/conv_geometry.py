"""How the kernel of a convolution moves over images, and the gradients that follow from it.

On a CPU, libraries are made for depthwise kernels of 3x3; for larger ones the kernel's gradient takes ten times as long
as the convolution. But `dK[c, i] = Σ dy[n, c, p] · x[n, c, stride · p + dilation · i]` is a depthwise convolution, too:
of the channels of all images with `dy` as kernels, where stride and dilation have changed places. That takes a fraction
of the time.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 2**20
"""Elements that are laid out anew at a time; more of them would not find their memory in use already."""

_FEW = 400
"""Positions up to which the gradient of a kernel that moves by one is faster from contiguous images (measured)."""


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
        zeros = (0,) * len(self.stride)
        return torch.convolution(
            x, kernel, bias, self.stride, self.padding, self.dilation, transposed=False, output_padding=zeros,
            groups=self.groups,
        )  # fmt: skip

    def gradients(
        self, dy: Tensor, x: Tensor, kernel: Tensor, *, of_x: bool, of_kernel: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of input and kernel."""
        large = of_kernel and self.is_large_depthwise(x, kernel)
        dx, dkernel, _ = torch.ops.aten.convolution_backward.default(
            dy, x, kernel, None, self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups,
            (of_x, of_kernel and not large, False),
        )  # fmt: skip
        return dx, self._depthwise_gradient(dy, x, kernel.shape) if large else dkernel

    def is_pointwise(self, kernel: Tensor) -> bool:
        """Whether the kernel sees one position at a time."""
        return kernel.shape[2:].numel() == 1 and not any(self.padding) and self.groups == 1

    def is_large_depthwise(self, x: Tensor, kernel: Tensor) -> bool:
        """Whether it is a depthwise kernel of images on a CPU that is larger than 3x3 and moves by one or two.

        Not where it has one position to go to: the output's gradient, as kernels of one position, would be very slow.
        """
        depthwise = self.groups == x.shape[1] == kernel.shape[0]
        large = kernel.ndim == 4 and max(kernel.shape[2:]) > 3 and max(self.stride) <= 2
        return depthwise and large and x.is_cpu and len(x) > 0 and self._moves(x, kernel)

    def _moves(self, x: Tensor, kernel: Tensor) -> bool:
        """Whether the output has more than one position."""
        moves = zip(x.shape[2:], kernel.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return any(size + 2 * pad - dilation * (k - 1) > stride for size, k, stride, pad, dilation in moves)

    def seen(self, x: Tensor) -> Tensor:
        """Returns the positions that a pointwise kernel sees; a view."""
        if max(self.stride) == 1:
            return x
        for axis, stride in enumerate(self.stride, start=2):
            x = x[(slice(None),) * axis + (slice(None, None, stride),)]
        return x

    def _depthwise_gradient(self, dy: Tensor, x: Tensor, size: torch.Size) -> Tensor:
        images = max(1, _AT_ONCE // x[0].numel())
        wide = torch.promote_types(x.dtype, torch.float32)
        few = x.shape[2] * x.shape[3] <= _FEW and max(self.stride) == 1
        parts = []
        for some_x, some_dy in zip(x.split(images), dy.to(x.dtype).split(images), strict=True):  # type: ignore[no-untyped-call]
            channels = some_x.shape[0] * some_x.shape[1]
            swapped = Geometry(self.dilation, self.padding, self.stride, channels)
            as_one = _contiguous_as_one if few or some_x.is_contiguous() else _channels_last_as_one
            each = swapped.convolve(as_one(some_x), some_dy.reshape(channels, 1, *dy.shape[2:]))
            # More is seen where the last stride does not reach the end of the image.
            each = each[..., : size[2], : size[3]].reshape(-1, *size)
            parts.append(each.sum(0, dtype=wide))
        return functools.reduce(Tensor.add_, parts).to(x.dtype)


def _contiguous_as_one(images: Tensor) -> Tensor:
    """Returns one image with the channels of all, `(1, batch * channels, height, width)`, contiguous."""
    return images.reshape(1, -1, *images.shape[2:])


def _channels_last_as_one(images: Tensor) -> Tensor:
    """Returns one image with the channels of all, `(1, batch * channels, height, width)`, its channels last."""
    height, width = images.shape[2:]
    return images.permute(2, 3, 0, 1).reshape(1, height, width, -1).permute(0, 3, 1, 2)


def pointwise(dimensions: int) -> Geometry:
    """Returns how a kernel moves that sees one position at a time."""
    ones = (1,) * dimensions
    return Geometry(ones, (0,) * dimensions, ones, 1)
