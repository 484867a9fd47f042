"""Output and gradients of a convolution with a low-rank update.

As for linear layers, the update is added to the kernel or to the output, whichever has less arithmetic. The gradients
of A and B come from small products (`r` channels instead of `out`), or from the ordinary gradient of the kernel and two
products more, again by their arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_plugins.kernels._autograd import Gradients, Options
from lora_plugins.kernels._channels import add_mixed_channels, channel_products, channels_last, mix_channels
from lora_plugins.kernels._path import Path, effective_weight_is_cheaper, may_form_effective_weight
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.dropout import Part, add_dropped, dropped_parts, part_of, sum_of_parts
from lora_plugins.kernels.matmul import effective_weight, factor_gradients
from lora_plugins.utils import laid_out_like

SMALL_SHARE = 0.4
"""Share of the arithmetic of the kernel's gradient up to which small products are faster (measured on ResNet-50)."""

_MANY = 8
"""How much larger than the small product or the effective kernel an input has to be for them to be saved as well."""


@dataclass(frozen=True, kw_only=True)
class ConvOptions(Options):
    """Options of a convolution.

    Args:
        geometry: How the kernel moves.
    """

    geometry: Geometry


def choose_path(x: Tensor, weight: Tensor, A: Tensor, dropout: float, geometry: Geometry) -> Path:
    """Returns how output and gradients are computed, by what has less arithmetic."""
    (r, inputs), outputs = A.shape, weight.shape[0]
    positions = x.numel() // x.shape[1] // math.prod(geometry.stride)
    grouped = geometry.groups > 1
    is_cheaper = grouped or effective_weight_is_cheaper(positions, inputs, outputs)
    effective_weight_first = is_cheaper and may_form_effective_weight(weight, dropout)
    share = 2 * r / outputs + 2 * r / inputs
    return Path(effective_weight_first, not grouped and (share < SMALL_SHARE or not effective_weight_first))


def is_linear(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a linear layer on the positions of images with channels last, which are rows in memory.

    Only of images: torch returns other convolutions contiguous, whatever the format of their input.
    """
    return x.ndim == 4 and channels_last(x) and geometry.is_pointwise(weight) and max(geometry.stride) == 1


class State(NamedTuple):
    """What a backward has: the tensors, the effective kernel or the small product if it was saved, and the options."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    small: Tensor | None
    options: ConvOptions


def output(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: ConvOptions
) -> tuple[Tensor, Tensor | None]:
    """Returns the output, and what is worth saving: the effective kernel, the update, or the small product.

    Args:
        x: `(batch, in, *size)`.
        weight: `(out, in / groups, *kernel_size)`.
        bias: `(out,)` or None.
        A: `(r, in / groups * kernel)`.
        B: `(out, r)`.
        options: Of the call.
    """
    convolve = options.geometry.convolve
    if options.path.effective_weight_first:
        kernel = effective_kernel(weight, A, B, options.scale, x.dtype)
        return convolve(x, kernel, bias), kernel if is_small(kernel.numel(), x, options) else None
    y = convolve(x, weight, bias)
    return y, (_add_products if options.path.small_products else _add_update)(y, x, weight, A, B, options)


def gradients(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of x, A and B where they are needed, from that of the output, `(batch, out, *size)`."""
    return _GRADIENTS[state.options.path](dy, state, needed)


def _through_kernel(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of x, A and B, from that of the effective kernel."""
    x, weight, A, B, kernel, options = state
    kernel = effective_kernel(weight, A, B, options.scale, dy.dtype) if kernel is None else kernel
    dx, dkernel = options.geometry.gradients(dy, x, kernel, of_x=needed[0], of_kernel=needed[1] or needed[2])
    if dkernel is None:
        return dx, None, None
    return dx, *factor_gradients(dkernel.flatten(1), A, B, options.scale)


def _through_both(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradient of x from the effective kernel, and those of A and B from small products."""
    x, weight, A, B, kernel, options = state
    dx = None
    if needed[0]:
        kernel = effective_kernel(weight, A, B, options.scale, dy.dtype) if kernel is None else kernel
        dx, _ = options.geometry.gradients(dy, x, kernel, of_x=True, of_kernel=False)
    A, B = A.to(dy.dtype), B.to(dy.dtype)
    h = _down(x, A, weight, options.geometry)
    _, dA, dB = _through_small(dy, State(x, weight, A, B, h, options), of_x=False)
    return dx, dA, dB


def _through_products(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of x, A and B where the small products were added to the output."""
    x, weight, A, B, h, options = state
    geometry = options.geometry
    dx, _ = geometry.gradients(dy, x, weight, of_x=needed[0], of_kernel=False)
    of_A, of_B = [], []
    for part, some, mask in dropped_parts(x, A.dtype, options.dropout, masks=True):
        some_h = _down(some, A, weight, geometry) if h is None else part_of(h, part)
        some_dy = part_of(dy, part).to(A.dtype)
        branch, dA, dB = _through_small(some_dy, State(some, weight, A, B, some_h, options), of_x=needed[0])
        _add_branch(dx, part, branch, mask, weight, geometry)
        of_A.append(dA)
        of_B.append(dB)
    return dx, sum_of_parts(of_A), sum_of_parts(of_B)


def _through_update(dy: Tensor, state: State, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of x, A and B where the input was convolved with the update as a kernel of its own."""
    x, weight, A, B, kernel, options = state
    geometry = options.geometry
    kernel = _delta_kernel(A, B, weight, options) if kernel is None else kernel
    dx, _ = geometry.gradients(dy, x, weight, of_x=needed[0], of_kernel=False)
    of_kernel = []
    for part, some, mask in dropped_parts(x, A.dtype, options.dropout, masks=True):
        some_dy = part_of(dy, part).to(A.dtype)
        branch, dkernel = geometry.gradients(some_dy, some, kernel, of_x=needed[0], of_kernel=True)
        _add_branch(dx, part, branch, mask, weight, geometry)
        of_kernel.append(dkernel)
    return dx, *factor_gradients(sum_of_parts(of_kernel).flatten(1), A, B, options.scale)


_GRADIENTS: dict[Path, Callable[[Tensor, State, Sequence[bool]], Gradients]] = {
    Path(effective_weight_first=True, small_products=False): _through_kernel,
    Path(effective_weight_first=True, small_products=True): _through_both,
    Path(effective_weight_first=False, small_products=True): _through_products,
    Path(effective_weight_first=False, small_products=False): _through_update,
}


def _through_small(dy: Tensor, state: State, *, of_x: bool) -> Gradients:
    """Returns the gradients of x, where the kernel sees it, A and B, by the small product.

    The input is used up if something was dropped from it.
    """
    x, weight, A, B, h, options = state
    assert h is not None
    geometry = options.geometry
    g = mix_channels(B.T, dy).mul_(options.scale)
    dB = channel_products(h, dy).mul_(options.scale).T
    kernel = A.view(A.shape[0], *weight.shape[1:])
    if not geometry.is_pointwise(weight):
        dx, dkernel = geometry.gradients(g, x, kernel, of_x=of_x, of_kernel=True)
        return dx, None if dkernel is None else dkernel.flatten(1), dB
    visible = geometry.visible(x)
    dA = channel_products(g, visible)
    return mix_channels(A.T, g, spare=visible if options.dropout else None) if of_x else None, dA, dB


def _down(x: Tensor, A: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolves the input with A: `(batch, r, *size)`."""
    if geometry.is_pointwise(weight):
        return mix_channels(A, geometry.visible(x))
    return geometry.convolve(x, A.view(A.shape[0], *weight.shape[1:]))


def _delta_kernel(A: Tensor, B: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    """Returns the update as a kernel of its own."""
    return (B @ A).view(weight.shape) * options.scale


def effective_kernel(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns the kernel with its update, in the memory format of the kernel, rounded to a type once."""
    return laid_out_like(weight, effective_weight(weight.flatten(1), A, B, scale, dtype).view(weight.shape))


def is_small(size: int, x: Tensor, options: ConvOptions) -> bool:
    """Whether something is saved because it is small beside the input, which itself is not computed again."""
    return options.recompute_input is None and size * _MANY <= x.numel()


def _add_products(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor | None:
    """Adds the small products to the output; returns those of x and A if they are to be saved."""
    saved = is_small(y.numel() // len(B) * len(A), x, options)
    down = []
    for part, some, _ in dropped_parts(x, A.dtype, options.dropout, masks=False):
        h = _down(some, A, weight, options.geometry)
        add_mixed_channels(part_of(y, part), B, h, options.scale)
        if saved:
            down.append(h)
    if len(down) == 1:
        return down[0]
    return torch.cat(down) if down else None


def _add_update(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor | None:
    """Adds the input's convolution with the update to the output; returns the update if it is to be saved."""
    kernel = _delta_kernel(A, B, weight, options)
    for part, some, _ in dropped_parts(x, A.dtype, options.dropout, masks=False):
        part_of(y, part).add_(options.geometry.convolve(some, kernel))
    return kernel if is_small(kernel.numel(), x, options) else None


def _add_branch(
    dx: Tensor | None, part: Part, branch: Tensor | None, mask: Tensor | None, weight: Tensor, geometry: Geometry
) -> None:
    """Adds what the branch gave to the gradient of some images, where the kernel sees them."""
    if dx is None or branch is None:
        return
    pointwise, target = geometry.is_pointwise(weight), part_of(dx, part)
    target = geometry.visible(target) if pointwise else target
    if mask is None:
        target.add_(branch)
    else:
        add_dropped(target, branch, geometry.visible(mask) if pointwise else mask)
