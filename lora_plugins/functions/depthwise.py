"""The gradient of a depthwise kernel as a convolution of the input with the output's gradient.

`dK[c, i] = Σ dy[n, c, p] · x[n, c, p · stride + i · dilation]` is itself a depthwise convolution, of the channels of
all images with `dy` as kernels, in which stride and dilation have changed places. On a CPU, libraries are made for 3x3
kernels; for larger ones their gradient takes ten times as long as the convolution, and this way a fraction of that.
"""

import torch
from torch import Tensor

_AT_ONCE = 2**18
"""Elements that are laid out anew at a time; more of them would not find their memory in use already."""


def is_worth_it(x: Tensor, kernel: Tensor, groups: int) -> bool:
    """Whether this way is faster: depthwise kernels of images on a CPU that are larger than 3x3."""
    depthwise = groups == x.shape[1] == kernel.shape[0]
    return depthwise and kernel.ndim == 4 and max(kernel.shape[2:]) > 3 and x.device.type == "cpu" and len(x) > 0


def kernel_gradient(
    dy: Tensor,
    x: Tensor,
    size: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Returns the gradient of a depthwise kernel.

    Args:
        dy: Gradient of the output, `(batch, channels, *size)`.
        x: Input, `(batch, channels, *size)`.
        size: Of the kernel: `(channels, 1, *size)`.
        stride: Per dimension.
        padding: Per dimension.
        dilation: Per dimension.
    """
    images = max(1, _AT_ONCE // x[0].numel())
    total = x.new_zeros(size, dtype=torch.promote_types(x.dtype, torch.float32))
    for some_x, some_dy in zip(x.split(images), dy.to(x.dtype).split(images), strict=True):  # type: ignore[no-untyped-call]
        channels = some_x.shape[0] * some_x.shape[1]
        each = torch.convolution(
            some_x.reshape(1, channels, *x.shape[2:]), some_dy.reshape(channels, 1, *dy.shape[2:]), None,
            dilation, padding, stride, transposed=False, output_padding=(0, 0), groups=channels,
        )  # fmt: skip
        total += each[..., : size[2], : size[3]].reshape(-1, *size).sum(0, dtype=total.dtype)
    return total.to(x.dtype)
