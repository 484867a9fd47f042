"""A convolution with a low-rank update as one autograd function.

Only the input, and what is small compared with it, is saved for the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_plugins.kernels._autograd import backward_in_full, call_under_autocast, law_gradients, save, saved
from lora_plugins.kernels._channels import gradient_of_bias
from lora_plugins.kernels._conv_products import (
    ConvOptions,
    State,
    choose_path,
    effective_kernel,
    gradients,
    is_linear,
    is_small,
    output,
)
from lora_plugins.kernels._eager import applies_in_eager_mode, eager_is_unknown, needs_law, raw_apply
from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.linear import lora_linear
from lora_plugins.kernels.update import Update


def fused_conv(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, geometry: Geometry) -> Tensor:
    """Convolves `x` with `W` and the dropped `x` with `scaling · B A`."""
    path = choose_path(x, weight, update.A, update.dropout, geometry)
    # With few channels, the gradient of the kernel is faster as that of a convolution.
    if path.small_products and is_linear(x, weight, geometry):
        return lora_linear(x, weight.flatten(1), bias, update, axis=1)
    options = ConvOptions.of_call(update, x, path, geometry=geometry)
    compute = _plain if _is_plain(x, weight, options) else _lora_conv
    return call_under_autocast(compute, x, weight, bias, update, options)


def _is_plain(x: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    """Whether torch's own operations save as little and compute as fast: through a small effective kernel."""
    through_kernel = options.path.effective_weight_first and not options.path.small_products
    small = through_kernel and is_small(weight.numel(), x, options)
    return small and not options.geometry.has_fast_gradient(x, weight)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: ConvOptions) -> Tensor:
    return options.geometry.convolve(x, effective_kernel(weight, A, B, options.scale, x.dtype), bias)


class _LoraConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, options: ConvOptions
    ) -> Tensor:
        y, small = output(x, weight, bias, A, B, options)
        save(ctx, options, x, weight, bias, A, B, small)
        return y

    @staticmethod
    @backward_in_full
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, small = saved(ctx)
        options: ConvOptions = ctx.options
        needed = ctx.needs_input_grad[:5]
        if needs_law(gradient):
            return *law_gradients(_law(options), (x, weight, ctx.bias, A, B), needed, gradient), None
        dx, dA, dB = gradients(gradient, State(x, weight, A, B, small, options), (needed[0], *needed[3:]))
        dweight = options.geometry.gradients(gradient, x, weight, of_x=False, of_kernel=True)[1] if needed[1] else None
        dbias = gradient_of_bias(gradient) if needed[2] else None
        return dx, dweight, dbias, dA, dB, None


_lora_conv = raw_apply(_LoraConv)


def _law(options: ConvOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        convolve = options.geometry.convolve
        dropped = x if options.dropout is None else x * options.dropout.mask_like(x)
        kernel = options.scale * (B @ A).view(weight.shape)
        return convolve(x, weight.to(x.dtype), bias) + convolve(dropped.to(A.dtype), kernel).to(x.dtype)

    return law


KERNELS = (Kernel("fused_conv", "lora_conv", eager_is_unknown, applies_in_eager_mode, fused_conv),)
