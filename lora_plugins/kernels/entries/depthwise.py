"""The gradient of a large depthwise kernel on a CPU, as a convolution of its own.

On a CPU, libraries are made for depthwise kernels of 3x3; for larger ones the kernel's gradient takes ten times as long
as the convolution. But `dK[c, i] = Σ dy[n, c, p] · x[n, c, stride · p + dilation · i]` is a depthwise convolution, too:
of the channels of all images with `dy` as kernels, where stride and dilation have changed places. That takes a fraction
of the time.
"""

import functools

import torch
from torch import Tensor

from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels.conv_geometry import Geometry

_CHUNK_ELEMENTS = 2**20
"""Elements that are laid out anew at a time; more of them would not find their memory in use already."""

_FEW_POSITIONS = 400
"""Positions up to which the gradient of a kernel that moves by one is faster from contiguous images (measured)."""


def is_large_depthwise(x: Tensor, kernel: Tensor, geometry: Geometry, dy: Tensor | None = None) -> bool:
    """Whether a kernel is depthwise and larger than 3x3, with a stride of one or two, on images on a CPU.

    Not if the output has a single position: the output's gradient, as kernels of one position, would be very slow.
    """
    depthwise = geometry.groups == x.shape[1] == kernel.shape[0]
    large = kernel.ndim == 4 and max(kernel.shape[2:]) > 3 and max(geometry.stride) <= 2
    return depthwise and large and x.is_cpu and len(x) > 0 and _moves(x, kernel, geometry)


def _moves(x: Tensor, kernel: Tensor, geometry: Geometry) -> bool:
    """Whether the output has more than one position."""
    steps = zip(
        x.shape[2:], kernel.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True
    )  # fmt: skip
    return any(size + 2 * pad - dilation * (k - 1) > stride for size, k, stride, pad, dilation in steps)


def depthwise_gradient(x: Tensor, kernel: Tensor, geometry: Geometry, dy: Tensor) -> Tensor:
    """Returns the gradient of the kernel."""
    size = kernel.shape
    images = max(1, _CHUNK_ELEMENTS // x[0].numel())
    wide = torch.promote_types(x.dtype, torch.float32)
    few = x.shape[2] * x.shape[3] <= _FEW_POSITIONS and max(geometry.stride) == 1
    parts = []
    for some_x, some_dy in zip(x.split(images), dy.to(x.dtype).split(images), strict=True):  # type: ignore[no-untyped-call]
        channels = some_x.shape[0] * some_x.shape[1]
        swapped = Geometry(geometry.dilation, geometry.padding, geometry.stride, channels)
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


KERNELS = (Kernel("depthwise", "kernel_gradient", lambda: "", is_large_depthwise, depthwise_gradient),)
