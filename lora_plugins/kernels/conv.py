"""A convolution with a low-rank update in one function.

As for linear layers, the update is added to the kernel or to the output, whichever has less arithmetic, and only the
input is kept for the backward, and what is small beside it. The gradients of A and B come from small products (`r`
channels instead of `out`), or from the ordinary gradient of the kernel followed by two products, again by their
arithmetic. The choice never depends on a clock, so that reruns, and all processes of a run on equal processors, compute
the same bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_plugins.kernels.channels import channels_last, contract, mix, mix_into
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.dropout import Dropout, Part, dropped_parts, part_of, total
from lora_plugins.kernels.eager import law_gradients
from lora_plugins.kernels.linear import lora_linear, may_go_first, update_is_cheaper, updated
from lora_plugins.kernels.matmul import project
from lora_plugins.kernels.options import Gradients, Options, apply, called, keep, kept
from lora_plugins.kernels.recompute import recomputation

SMALL_SHARE = 0.4
"""Share of the arithmetic of the kernel's gradient up to which small products are faster (measured on ResNet-50)."""

_MANY = 8
"""How much larger than the small product or the updated kernel an input has to be for them to be kept as well."""


@dataclass(frozen=True, kw_only=True)
class ConvOptions(Options):
    """What the function of a convolution knows beside what all do.

    Args:
        geometry: How the kernel moves.
    """

    geometry: Geometry


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
        low_memory: Whether `x` is computed again in the backward where it can be, and nothing small is kept then.
    """
    update_first, small_products = ways(x, weight, A, dropout, geometry)
    # With few channels, the gradient of the kernel is faster as that of a convolution.
    if small_products and _is_linear(x, weight, geometry):
        matrix = weight.flatten(1)
        return lora_linear(x, matrix, bias, A, B, scaling, dropout, axis=1, low_memory=low_memory)
    options = ConvOptions(
        scaling=scaling,
        dropout=Dropout.draw(dropout) if dropout else None,
        update_first=update_first,
        small_products=small_products,
        again=recomputation(x) if low_memory else None,
        geometry=geometry,
    )
    return apply(_plain if _is_plain(x, weight, options) else _lora_conv, x, weight, bias, A, B, options)


def _is_linear(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether it is a linear layer on the rows that images with channels last are in memory.

    Only of images: torch returns other convolutions contiguous, whatever the format of their input.
    """
    return x.ndim == 4 and channels_last(x) and geometry.is_pointwise(weight) and max(geometry.stride) == 1


def ways(x: Tensor, weight: Tensor, A: Tensor, dropout: float, geometry: Geometry) -> tuple[bool, bool]:
    """Returns whether the update goes first, and whether A and B get their gradients from small products."""
    (r, inputs), outputs = A.shape, weight.shape[0]
    positions = x.numel() // x.shape[1] // math.prod(geometry.stride)
    grouped = geometry.groups > 1
    update_first = (grouped or update_is_cheaper(positions, inputs, outputs)) and may_go_first(weight, dropout)
    share = 2 * r / outputs + 2 * r / inputs
    return update_first, not grouped and (share < SMALL_SHARE or not update_first)


def _is_plain(x: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    """Whether torch's own operations keep as little and compute as fast: with a small kernel that is updated first."""
    through_kernel = options.update_first and not options.small_products
    small = through_kernel and _is_small(weight.numel(), x, options)
    return small and not options.geometry.is_large_depthwise(x, weight)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor:
    return options.geometry.convolve(x, _updated(weight, A, B, options.scale, x.dtype), bias)


class _Saved(NamedTuple):
    """What the backward has: the tensors, the updated kernel or the small product if it was kept, and the options."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    small: Tensor | None
    options: ConvOptions


class _LoraConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: ConvOptions
    ) -> Tensor:
        convolve = options.geometry.convolve
        small: Tensor | None
        if options.update_first:
            kernel = _updated(weight, A, B, options.scale, x.dtype)
            y, small = convolve(x, kernel, bias), kernel if _is_small(kernel.numel(), x, options) else None
        else:
            y = convolve(x, weight, bias)
            small = (_add_products if options.small_products else _add_update)(y, x, weight, A, B, options)
        keep(ctx, options, x, weight, bias, A, B, small)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, small = kept(ctx)
        options: ConvOptions = ctx.options
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *law_gradients(_law(options), (x, weight, bias, A, B), needed, gradient), None
        of_factors = _GRADIENTS[options.update_first, options.small_products]
        dx, dA, dB = of_factors(gradient, _Saved(x, weight, A, B, small, options), needed)
        dweight = options.geometry.gradients(gradient, x, weight, of_x=False, of_kernel=True)[1] if needed[1] else None
        dbias = gradient.transpose(0, 1).flatten(1).sum(1) if needed[2] else None
        return dx, dweight, dbias, dA, dB, None


_lora_conv = called(_LoraConv)


def _through_kernel(dy: Tensor, saved: _Saved, needed: Sequence[bool]) -> Gradients:
    """Gradients of x, A and B from that of the updated kernel."""
    x, weight, A, B, kernel, options = saved
    kernel = _updated(weight, A, B, options.scale, dy.dtype) if kernel is None else kernel
    dx, dkernel = options.geometry.gradients(dy, x, kernel, of_x=needed[0], of_kernel=needed[3] or needed[4])
    if dkernel is None:
        return dx, None, None
    return dx, *project(dkernel.flatten(1), A, B, options.scale)


def _through_both(dy: Tensor, saved: _Saved, needed: Sequence[bool]) -> Gradients:
    """Gradient of x from the updated kernel, those of A and B from small products."""
    x, weight, A, B, kernel, options = saved
    dx = None
    if needed[0]:
        kernel = _updated(weight, A, B, options.scale, dy.dtype) if kernel is None else kernel
        dx, _ = options.geometry.gradients(dy, x, kernel, of_x=True, of_kernel=False)
    A, B = A.to(dy.dtype), B.to(dy.dtype)
    h = _down(x, A, weight, options.geometry)
    _, dA, dB = _through_products_of(x, h, dy, A, B, weight, options, of_x=False)
    return dx, dA, dB


def _through_products(dy: Tensor, saved: _Saved, needed: Sequence[bool]) -> Gradients:
    """Gradients of x, A and B where the small products were added to the output."""
    x, weight, A, B, h, options = saved
    geometry = options.geometry
    dx, _ = geometry.gradients(dy, x, weight, of_x=needed[0], of_kernel=False)
    of_A, of_B = [], []
    for part, some, mask in dropped_parts(x, A.dtype, options.dropout, masks=True):
        some_h = _down(some, A, weight, geometry) if h is None else part_of(h, part)
        some_dy = part_of(dy, part).to(A.dtype)
        branch, dA, dB = _through_products_of(some, some_h, some_dy, A, B, weight, options, of_x=needed[0])
        _add_branch(dx, part, branch, mask, weight, geometry)
        of_A.append(dA)
        of_B.append(dB)
    return dx, total(of_A), total(of_B)


def _through_update(dy: Tensor, saved: _Saved, needed: Sequence[bool]) -> Gradients:
    """Gradients of x, A and B where the input was convolved with the update as a kernel of its own."""
    x, weight, A, B, kernel, options = saved
    geometry = options.geometry
    kernel = _kernel(A, B, weight) * options.scale if kernel is None else kernel
    dx, _ = geometry.gradients(dy, x, weight, of_x=needed[0], of_kernel=False)
    of_kernel = []
    for part, some, mask in dropped_parts(x, A.dtype, options.dropout, masks=True):
        some_dy = part_of(dy, part).to(A.dtype)
        branch, dkernel = geometry.gradients(some_dy, some, kernel, of_x=needed[0], of_kernel=True)
        _add_branch(dx, part, branch, mask, weight, geometry)
        of_kernel.append(dkernel)
    return dx, *project(total(of_kernel).flatten(1), A, B, options.scale)


_GRADIENTS: dict[tuple[bool, bool], Callable[[Tensor, _Saved, Sequence[bool]], Gradients]] = {
    (True, False): _through_kernel,
    (True, True): _through_both,
    (False, True): _through_products,
    (False, False): _through_update,
}


def _through_products_of(
    x: Tensor, h: Tensor, dy: Tensor, A: Tensor, B: Tensor, weight: Tensor, options: ConvOptions, *, of_x: bool
) -> Gradients:
    """Gradients of x, where the kernel sees it, of A and of B; x is used up if something was dropped from it."""
    geometry = options.geometry
    g = mix(B.T, dy).mul_(options.scale)
    dB = contract(h, dy).mul_(options.scale).T
    kernel = A.view(A.shape[0], *weight.shape[1:])
    if not geometry.is_pointwise(weight):
        dx, dkernel = geometry.gradients(g, x, kernel, of_x=of_x, of_kernel=True)
        return dx, None if dkernel is None else dkernel.flatten(1), dB
    seen = geometry.seen(x)
    dA = contract(g, seen)
    return mix(A.T, g, spare=seen if options.dropout else None) if of_x else None, dA, dB


def _down(x: Tensor, A: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolves the input with A: `(batch, r, *size)`."""
    if geometry.is_pointwise(weight):
        return mix(A, geometry.seen(x))
    return geometry.convolve(x, A.view(A.shape[0], *weight.shape[1:]))


def _kernel(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    return (B @ A).view(weight.shape)


def _updated(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns the kernel with its update, in the memory format of the kernel, rounded to a type once."""
    matrix = updated(weight.flatten(1), A, B, scale, dtype).view(weight.shape)
    return matrix if weight.is_contiguous() else torch.empty_like(weight, dtype=dtype).copy_(matrix)


def _is_small(size: int, x: Tensor, options: ConvOptions) -> bool:
    """Whether something is kept because it is small beside the input, which itself is not computed again."""
    return options.again is None and size * _MANY <= x.numel()


def _add_products(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor | None:
    """Adds the small products to the output; returns those of x and A if they are to be kept."""
    is_small = _is_small(y.numel() // len(B) * len(A), x, options)
    down = []
    for part, some, _ in dropped_parts(x, A.dtype, options.dropout, masks=False):
        h = _down(some, A, weight, options.geometry)
        mix_into(part_of(y, part), B, h, options.scale)
        down += [h] * is_small
    if len(down) == 1:
        return down[0]
    return torch.cat(down) if down else None


def _add_update(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor | None:
    """Adds the input's convolution with the update to the output; returns the update if it is to be kept."""
    kernel = _kernel(A, B, weight) * options.scale
    for part, some, _ in dropped_parts(x, A.dtype, options.dropout, masks=False):
        part_of(y, part).add_(options.geometry.convolve(some, kernel))
    return kernel if _is_small(kernel.numel(), x, options) else None


def _add_branch(
    dx: Tensor | None, part: Part, branch: Tensor | None, mask: Tensor | None, weight: Tensor, geometry: Geometry
) -> None:
    """Adds what the branch gave to the gradient of some images, where the kernel sees them."""
    if dx is None or branch is None:
        return
    pointwise, target = geometry.is_pointwise(weight), part_of(dx, part)
    target = geometry.seen(target) if pointwise else target
    if mask is None:
        target.add_(branch)
    else:
        target.addcmul_(branch, geometry.seen(mask) if pointwise else mask)


def _law(options: ConvOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        convolve = options.geometry.convolve
        dropped = x if options.dropout is None else x * options.dropout.mask_like(x)
        kernel = options.scale * _kernel(A, B, weight)
        return convolve(x, weight.to(x.dtype), bias) + convolve(dropped.to(A.dtype), kernel).to(x.dtype)

    return law
