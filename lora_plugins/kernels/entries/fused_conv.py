"""A convolution with a low-rank update as one autograd function.

As for linear layers, the update is added to the kernel or to the output, whichever has less arithmetic, and only the
input is saved for the backward, and what is small beside it. The gradients of A and B come from small products (`r`
channels instead of `out`), or from the ordinary gradient of the kernel followed by two products, again by their
arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_plugins.kernels._autograd import (
    Gradients,
    Options,
    call_under_autocast,
    law_gradients,
    recomputation,
    save,
    saved,
)
from lora_plugins.kernels._channels import add_mixed_channels, channel_products, channels_last, mix_channels
from lora_plugins.kernels._eager import applies_in_eager_mode, eager_is_unknown, raw_apply
from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels._path import Path, effective_weight_is_cheaper, may_form_effective_weight
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.dropout import Dropout, Part, dropped_parts, part_of, sum_of_parts
from lora_plugins.kernels.linear import lora_linear
from lora_plugins.kernels.matmul import effective_weight, factor_gradients

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


def fused_conv(
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
    """Convolves `x` with `W` and the dropped `x` with `scaling · B A`."""
    path = choose_path(x, weight, A, dropout, geometry)
    # With few channels, the gradient of the kernel is faster as that of a convolution.
    if path.small_products and _is_linear(x, weight, geometry):
        matrix = weight.flatten(1)
        return lora_linear(x, matrix, bias, A, B, scaling, dropout, axis=1, low_memory=low_memory)
    options = ConvOptions(
        scaling=scaling,
        dropout=Dropout.draw(dropout) if dropout else None,
        path=path,
        recompute_input=recomputation(x) if low_memory else None,
        geometry=geometry,
    )
    compute = _plain if _is_plain(x, weight, options) else _lora_conv
    return call_under_autocast(compute, x, weight, bias, A, B, options)


def choose_path(x: Tensor, weight: Tensor, A: Tensor, dropout: float, geometry: Geometry) -> Path:
    """Returns how output and gradients are computed, by what has less arithmetic."""
    (r, inputs), outputs = A.shape, weight.shape[0]
    positions = x.numel() // x.shape[1] // math.prod(geometry.stride)
    grouped = geometry.groups > 1
    is_cheaper = grouped or effective_weight_is_cheaper(positions, inputs, outputs)
    effective_weight_first = is_cheaper and may_form_effective_weight(weight, dropout)
    share = 2 * r / outputs + 2 * r / inputs
    return Path(effective_weight_first, not grouped and (share < SMALL_SHARE or not effective_weight_first))


def _is_linear(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether it is a linear layer on the rows that images with channels last are in memory.

    Only of images: torch returns other convolutions contiguous, whatever the format of their input.
    """
    return x.ndim == 4 and channels_last(x) and geometry.is_pointwise(weight) and max(geometry.stride) == 1


def _is_plain(x: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    """Whether torch's own operations save as little and compute as fast: through a small effective kernel."""
    through_kernel = options.path.effective_weight_first and not options.path.small_products
    small = through_kernel and _is_small(weight.numel(), x, options)
    return small and not options.geometry.has_fast_gradient(x, weight)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor:
    return options.geometry.convolve(x, _effective_kernel(weight, A, B, options.scale, x.dtype), bias)


class _Backward(NamedTuple):
    """What a backward has: the tensors, the effective kernel or the small product if it was saved, and the options."""

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
        if options.path.effective_weight_first:
            kernel = _effective_kernel(weight, A, B, options.scale, x.dtype)
            y, small = convolve(x, kernel, bias), kernel if _is_small(kernel.numel(), x, options) else None
        else:
            y = convolve(x, weight, bias)
            small = (_add_products if options.path.small_products else _add_update)(y, x, weight, A, B, options)
        save(ctx, options, x, weight, bias, A, B, small)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, small = saved(ctx)
        options: ConvOptions = ctx.options
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *law_gradients(_law(options), (x, weight, bias, A, B), needed, gradient), None
        of_factors = _GRADIENTS[options.path]
        dx, dA, dB = of_factors(gradient, _Backward(x, weight, A, B, small, options), needed)
        dweight = options.geometry.gradients(gradient, x, weight, of_x=False, of_kernel=True)[1] if needed[1] else None
        dbias = gradient.transpose(0, 1).flatten(1).sum(1) if needed[2] else None
        return dx, dweight, dbias, dA, dB, None


_lora_conv = raw_apply(_LoraConv)


def _through_kernel(dy: Tensor, state: _Backward, needed: Sequence[bool]) -> Gradients:
    """Gradients of x, A and B from that of the effective kernel."""
    x, weight, A, B, kernel, options = state
    kernel = _effective_kernel(weight, A, B, options.scale, dy.dtype) if kernel is None else kernel
    dx, dkernel = options.geometry.gradients(dy, x, kernel, of_x=needed[0], of_kernel=needed[3] or needed[4])
    if dkernel is None:
        return dx, None, None
    return dx, *factor_gradients(dkernel.flatten(1), A, B, options.scale)


def _through_both(dy: Tensor, state: _Backward, needed: Sequence[bool]) -> Gradients:
    """Gradient of x from the effective kernel, those of A and B from small products."""
    x, weight, A, B, kernel, options = state
    dx = None
    if needed[0]:
        kernel = _effective_kernel(weight, A, B, options.scale, dy.dtype) if kernel is None else kernel
        dx, _ = options.geometry.gradients(dy, x, kernel, of_x=True, of_kernel=False)
    A, B = A.to(dy.dtype), B.to(dy.dtype)
    h = _down(x, A, weight, options.geometry)
    _, dA, dB = _through_products_of(x, h, dy, A, B, weight, options, of_x=False)
    return dx, dA, dB


def _through_products(dy: Tensor, state: _Backward, needed: Sequence[bool]) -> Gradients:
    """Gradients of x, A and B where the small products were added to the output."""
    x, weight, A, B, h, options = state
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
    return dx, sum_of_parts(of_A), sum_of_parts(of_B)


def _through_update(dy: Tensor, state: _Backward, needed: Sequence[bool]) -> Gradients:
    """Gradients of x, A and B where the input was convolved with the update as a kernel of its own."""
    x, weight, A, B, kernel, options = state
    geometry = options.geometry
    kernel = _kernel(A, B, weight) * options.scale if kernel is None else kernel
    dx, _ = geometry.gradients(dy, x, weight, of_x=needed[0], of_kernel=False)
    of_kernel = []
    for part, some, mask in dropped_parts(x, A.dtype, options.dropout, masks=True):
        some_dy = part_of(dy, part).to(A.dtype)
        branch, dkernel = geometry.gradients(some_dy, some, kernel, of_x=needed[0], of_kernel=True)
        _add_branch(dx, part, branch, mask, weight, geometry)
        of_kernel.append(dkernel)
    return dx, *factor_gradients(sum_of_parts(of_kernel).flatten(1), A, B, options.scale)


_GRADIENTS: dict[Path, Callable[[Tensor, _Backward, Sequence[bool]], Gradients]] = {
    Path(effective_weight_first=True, small_products=False): _through_kernel,
    Path(effective_weight_first=True, small_products=True): _through_both,
    Path(effective_weight_first=False, small_products=True): _through_products,
    Path(effective_weight_first=False, small_products=False): _through_update,
}


def _through_products_of(
    x: Tensor, h: Tensor, dy: Tensor, A: Tensor, B: Tensor, weight: Tensor, options: ConvOptions, *, of_x: bool
) -> Gradients:
    """Gradients of x, where the kernel sees it, of A and of B; x is used up if something was dropped from it."""
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


def _kernel(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    return (B @ A).view(weight.shape)


def _effective_kernel(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns the kernel with its update, in the memory format of the kernel, rounded to a type once."""
    matrix = effective_weight(weight.flatten(1), A, B, scale, dtype).view(weight.shape)
    return matrix if weight.is_contiguous() else torch.empty_like(weight, dtype=dtype).copy_(matrix)


def _is_small(size: int, x: Tensor, options: ConvOptions) -> bool:
    """Whether something is saved because it is small beside the input, which itself is not computed again."""
    return options.recompute_input is None and size * _MANY <= x.numel()


def _add_products(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor | None:
    """Adds the small products to the output; returns those of x and A if they are to be saved."""
    is_small = _is_small(y.numel() // len(B) * len(A), x, options)
    down = []
    for part, some, _ in dropped_parts(x, A.dtype, options.dropout, masks=False):
        h = _down(some, A, weight, options.geometry)
        add_mixed_channels(part_of(y, part), B, h, options.scale)
        down += [h] * is_small
    if len(down) == 1:
        return down[0]
    return torch.cat(down) if down else None


def _add_update(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor | None:
    """Adds the input's convolution with the update to the output; returns the update if it is to be saved."""
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
    target = geometry.visible(target) if pointwise else target
    if mask is None:
        target.add_(branch)
    else:
        target.addcmul_(branch, geometry.visible(mask) if pointwise else mask)


def _law(options: ConvOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        convolve = options.geometry.convolve
        dropped = x if options.dropout is None else x * options.dropout.mask_like(x)
        kernel = options.scale * _kernel(A, B, weight)
        return convolve(x, weight.to(x.dtype), bias) + convolve(dropped.to(A.dtype), kernel).to(x.dtype)

    return law


KERNELS = (Kernel("fused_conv", "lora_conv", eager_is_unknown, applies_in_eager_mode, fused_conv),)
