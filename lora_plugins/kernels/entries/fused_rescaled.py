"""A layer with an updated and rescaled weight as one autograd function, which keeps its input and some outputs.

The weight is formed again in the backward. What rescales its rows gets its gradient from the gradient of the whole
weight, `G`: a product as large as the layer's own, but nothing has to be kept for it. Those of A and B follow from `G`
by small products: with `f` held constant, they are `scaling · Bᵀ (f · G)` and `scaling · (f · G) Aᵀ`. Under autocast
the rounded weight is kept, as a plain layer keeps its own.

Linear layers on a CPU do without `G` where their output is kept at little cost: what rescales gets its gradient from
the output, and A and B by products with `r` columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels._autograd import Options, backward_in_full, call_under_autocast, law_gradients, save, saved
from lora_plugins.kernels._channels import as_rows, gradient_of_bias, gradient_of_rows
from lora_plugins.kernels._eager import applies_in_eager_mode, eager_is_unknown, needs_law, raw_apply
from lora_plugins.kernels._kept_output import KeptOutput, gradient_of_factors, tells_rescaling
from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels._path import Path
from lora_plugins.kernels._products import State, gradients, rank_is_high
from lora_plugins.kernels.conv_geometry import Geometry
from lora_plugins.kernels.dropout import Dropout, add_dropped, dropped_parts, part_of, sum_of_parts
from lora_plugins.kernels.matmul import effective_weight, linear_2d, matmul, scaled_product, transposed_product
from lora_plugins.kernels.update import Rescaling, Update
from lora_plugins.utils import autocast_dtype, common_type, laid_out_like, without_hooks_of_others


@dataclass(frozen=True, kw_only=True)
class RescaledOptions(Options):
    """Options of a rescaled layer.

    Args:
        geometry: How a kernel moves; None in a linear layer.
        factors: What the rows of the weight are multiplied by.
        kept: The output, from which they get their gradient; None if that is the one of the weight's.
    """

    geometry: Geometry | None
    factors: Callable[..., Tensor]
    kept: KeptOutput | None


def fused_rescaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: Update,
    rescaling: Rescaling,
    geometry: Geometry | None,
) -> Tensor:
    """Computes with `f · (W + scaling · B A)`; with dropout, only what that adds to `W` sees the dropped `x`."""
    kept = KeptOutput() if geometry is None and _keeps_output(x, weight, update, rescaling) else None
    # The effective weight: under autocast, weight and factors keep their types, and what they make is rounded once.
    path = Path(effective_weight_first=True, small_products=kept is not None)
    options = RescaledOptions.of_call(update, x, path, geometry=geometry, factors=rescaling.factors, kept=kept)

    def compute(*tensors: Any) -> Tensor:
        y = _rescaled(*tensors, *rescaling.own)
        return y if kept is None else kept.keep(y)

    return call_under_autocast(compute, x, weight, bias, update, options)


def _keeps_output(x: Tensor, weight: Tensor, update: Update, rescaling: Rescaling) -> bool:
    """Whether a linear layer keeps its output: where that is wide, so that what follows keeps it, or small beside x.

    In a transformer, attention and activations keep what they are given, and sums do not. On a GPU it was not measured.
    Sums over fp16 may be too large for its numbers.
    """
    outputs, inputs = weight.shape
    costs_little = outputs > inputs or 2 * outputs <= inputs
    is_plain = not (update.dropout or update.low_memory or weight.requires_grad)
    is_needed = any(tensor.requires_grad for tensor in rescaling.own)
    in_half = torch.float16 in (x.dtype, autocast_dtype(x))
    rows = x.numel() // inputs
    is_faster = x.is_cpu and not rank_is_high(rows, weight, update.A)
    return costs_little and is_plain and is_needed and not in_half and is_faster


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        options: RescaledOptions,
        *own: Tensor,
    ) -> Tensor:
        direction = _direction(weight, A, B, options)
        ctx.own, ctx.factors = _factors(direction, own, options)
        factors, layer = ctx.factors.detach(), _layer(options)
        inputs = layer.flat(x)
        if options.dropout is None:
            matrix = _whole_weight(direction, factors, weight, x.dtype)
            y = layer.apply(inputs, matrix, bias)
        else:
            matrix = _beyond_weight(direction, factors, weight, x.dtype, options.dropout)
            y = layer.apply(inputs, weight.to(x.dtype), bias)
            for part, some, _ in dropped_parts(inputs, x.dtype, options.dropout, masks=False):
                part_of(y, part).add_(layer.apply(some, matrix, None))
        keeps = options.dropout is None and x.dtype != weight.dtype and not options.low_memory
        keeps = keeps and ctx.needs_input_grad[0]
        save(ctx, options, x, weight, bias, A, B, matrix if keeps else None, *own)
        ctx.steps = inputs.stride()
        ctx.bias_in_output = None if bias is None or options.kept is None else bias.clone()
        return layer.outputs(y, x)

    @staticmethod
    @backward_in_full
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, matrix, *own = saved(ctx)
        options: RescaledOptions = ctx.options
        needed = (*ctx.needs_input_grad[:5], *ctx.needs_input_grad[6:])
        y = None if options.kept is None else options.kept.take()
        if needs_law(gradient):
            of_law = law_gradients(_law(options), (x, weight, ctx.bias, A, B, *own), needed, gradient)
            return (*of_law[:5], None, *of_law[5:])
        layer, factors = _layer(options), ctx.factors.detach()
        inputs, dy = layer.flat(x), layer.flat(gradient)

        def whole() -> Tensor:
            if matrix is not None:
                return matrix
            return _whole_weight(_direction(weight, A, B, options), factors, weight, x.dtype)

        call = _Call(inputs, weight, whole, A, B, factors, options)
        if y is not None and tells_rescaling(as_rows(y, -1), ctx.bias_in_output, factors):
            found = _through_output(dy, as_rows(y, -1), ctx.bias_in_output, call, needed)
        else:
            found = _through_weight(dy, call, needed)
        return (
            None if found.x is None else layer.input_gradient(x, found.x, ctx.steps),
            found.weight,
            layer.bias_gradient(dy) if needed[2] else None,
            found.A,
            found.B,
            None,
            *_own_gradients(ctx.own, ctx.factors, found.factors),
        )


_rescaled = raw_apply(_Rescaled)


class _Call(NamedTuple):
    """What a backward has of its forward; `whole` returns `f · (W + scaling · B A)`."""

    inputs: Tensor
    weight: Tensor
    whole: Callable[[], Tensor]
    A: Tensor
    B: Tensor
    factors: Tensor
    options: RescaledOptions


class _Found(NamedTuple):
    """Gradients, of what needs them, and of the factors."""

    x: Tensor | None
    weight: Tensor | None
    A: Tensor | None
    B: Tensor | None
    factors: Tensor


def _through_weight(dy: Tensor, call: _Call, needed: Sequence[bool]) -> _Found:
    """Returns the gradients, from that of the whole weight."""
    inputs, weight, whole, A, B, factors, options = call
    if options.dropout is None:
        dx, of_weight = _layer(options).gradients(dy, inputs, whole(), of_x=needed[0])
    else:
        beyond = _beyond_weight(_direction(weight, A, B, options), factors, weight, inputs.dtype, options.dropout)
        dx, of_weight = _update_gradients(dy, inputs, weight, beyond, options, needed[0])
    G = of_weight.flatten(1).to(A.dtype)
    if options.dropout is not None:
        G = G * options.dropout.scale
    products = linear_2d(G, A)
    return _Found(
        dx,
        _weight_gradient(dy, inputs, weight, G, factors, options) if needed[1] else None,
        scaled_product(A, (B * factors[:, None]).T, G, options.scaling) if needed[3] else None,
        (products * factors[:, None]).mul_(options.scaling) if needed[4] else None,
        (G * weight.flatten(1)).sum(1).add_((products * B).sum(1), alpha=options.scaling),
    )


def _through_output(dy: Tensor, y: Tensor, bias: Tensor | None, call: _Call, needed: Sequence[bool]) -> _Found:
    """Returns the gradients in a linear layer whose weight is frozen, without that of the whole weight."""
    inputs, _, whole, A, B, factors, options = call
    rows = factors[:, None]
    dx, dA, dB = gradients(dy, State(inputs, whole, A, B * rows, options), (needed[0], *needed[3:5]))
    return _Found(dx, None, dA, None if dB is None else dB * rows, gradient_of_factors(dy, y, bias, factors))


class _Linear:
    """What is computed with the matrix of a linear layer, on the rows of its input."""

    def flat(self, tensor: Tensor) -> Tensor:
        return as_rows(tensor, -1)

    def apply(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_2d(rows, weight, bias)

    def outputs(self, rows: Tensor, x: Tensor) -> Tensor:
        # In place, so as not to be a view: autograd would refuse to let what follows write into it.
        return rows.resize_(*x.shape[:-1], rows.shape[1])

    def gradients(self, dy: Tensor, rows: Tensor, weight: Tensor, *, of_x: bool) -> tuple[Tensor | None, Tensor]:
        of_weight = transposed_product(dy, rows)
        return self.of_input(dy, rows, weight) if of_x else None, of_weight

    def of_input(self, dy: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        return matmul(dy, weight)

    def input_gradient(self, x: Tensor, gradient: Tensor, steps: tuple[int, ...]) -> Tensor:
        return gradient_of_rows(steps, gradient).view(x.shape)

    def bias_gradient(self, dy: Tensor) -> Tensor:
        return dy.sum(0)


class _Convolution:
    """What is computed with the kernel of a convolution."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def flat(self, tensor: Tensor) -> Tensor:
        return tensor

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.geometry.convolve(x, weight, bias)

    def outputs(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> tuple[Tensor | None, Tensor]:
        dx, of_weight = self.geometry.gradients(dy, x, weight, of_x=of_x, of_kernel=True)
        assert of_weight is not None
        return dx, of_weight

    def of_input(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        dx, _ = self.geometry.gradients(dy, x, weight, of_x=True, of_kernel=False)
        assert dx is not None
        return dx

    def input_gradient(self, x: Tensor, gradient: Tensor, steps: tuple[int, ...]) -> Tensor:
        return gradient

    def bias_gradient(self, dy: Tensor) -> Tensor:
        return gradient_of_bias(dy)


def _layer(options: RescaledOptions) -> _Linear | _Convolution:
    return _Linear() if options.geometry is None else _Convolution(options.geometry)


def _direction(weight: Tensor, A: Tensor, B: Tensor, options: RescaledOptions) -> Tensor:
    """Returns `W + scaling · B A` as a fresh matrix, in the wider type of both."""
    return effective_weight(weight.flatten(1), A, B, options.scaling, common_type(weight.dtype, A.dtype))


def _factors(direction: Tensor, own: Sequence[Tensor], options: RescaledOptions) -> tuple[list[Tensor], Tensor]:
    """Returns the variant's own tensors as leaves, and what the rows are multiplied by, with its graph behind it.

    Hooks of saved tensors are kept from that graph, whose backward runs within another: checkpointing would compute
    its whole part of the model again for each such backward.
    """
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in own]
    with torch.enable_grad(), without_hooks_of_others():
        return leaves, options.factors(direction, *leaves)


def _own_gradients(leaves: Sequence[Tensor], factors: Tensor, gradient: Tensor) -> Iterator[Tensor | None]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(factors, wanted, gradient, retain_graph=True) if wanted else ())
    return (next(found) if leaf.requires_grad else None for leaf in leaves)


def _whole_weight(direction: Tensor, factors: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `f · (W + scaling · B A)`, laid out like W; overwrites `direction`."""
    whole = direction.mul_(factors[:, None])
    return laid_out_like(weight, whole.to(dtype).view(weight.shape))


def _beyond_weight(direction: Tensor, factors: Tensor, weight: Tensor, dtype: torch.dtype, dropout: Dropout) -> Tensor:
    """Returns what that has beyond W, with what makes up for dropped elements; overwrites `direction`."""
    beyond = direction.mul_(factors[:, None]).sub_(weight.flatten(1)).mul_(dropout.scale)
    return laid_out_like(weight, beyond.to(dtype).view(weight.shape))


def _update_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, matrix: Tensor, options: RescaledOptions, of_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Returns the gradients of x and of what is added to W, without what makes up for dropped elements."""
    layer = _layer(options)
    dx = layer.of_input(dy, x, weight.to(x.dtype)) if of_x else None
    of_weight = []
    for part, some, mask in dropped_parts(x, x.dtype, options.dropout, masks=True):
        branch, of_update = layer.gradients(part_of(dy, part), some, matrix, of_x=of_x)
        if dx is not None and branch is not None and mask is not None:
            add_dropped(part_of(dx, part), branch, mask)
        of_weight.append(of_update)
    return dx, sum_of_parts(of_weight)


def _weight_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, G: Tensor, factors: Tensor, options: RescaledOptions
) -> Tensor:
    """Returns the gradient of W itself."""
    if options.dropout is None:
        return (G * factors[:, None]).view(weight.shape).to(weight.dtype)
    _, plain = _layer(options).gradients(dy, x, weight.to(x.dtype), of_x=False)
    return plain.add(G.mul(factors[:, None] - 1).view(weight.shape)).to(weight.dtype)


def _law(options: RescaledOptions) -> Callable[..., Tensor]:
    def law(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *own: Tensor) -> Tensor:
        apply = F.linear if options.geometry is None else options.geometry.convolve
        inputs = _layer(options).flat(x)
        direction = _direction(weight, A, B, options)
        whole = (options.factors(direction.detach(), *own)[:, None] * direction).view(weight.shape)
        y = apply(inputs, (whole if options.dropout is None else weight).to(x.dtype), bias)
        if options.dropout is not None:
            dropped = inputs * options.dropout.mask_like(inputs) * options.dropout.scale
            y = y + apply(dropped, (whole - weight).to(x.dtype))
        return y if options.geometry is not None else y.view(*x.shape[:-1], len(weight))

    return law


KERNELS = (Kernel("fused_rescaled", "lora_rescaled", eager_is_unknown, applies_in_eager_mode, fused_rescaled),)
