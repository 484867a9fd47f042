"""When a hand-written gradient may be used, and what stands in for it in a second derivative."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_eager(x: Tensor) -> bool:
    """Whether operations on `x` run now, one by one: no compiler, tracer, transform, dual numbers or meta tensors."""
    return not (
        x.is_meta
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.utils._python_dispatch._get_current_dispatch_mode() is not None
    )


def law_gradients(
    law: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Returns the gradients of a law written in plain operations, themselves differentiable.

    Args:
        law: Computes the output from `inputs`.
        inputs: Its tensors, or None where an option is not given.
        needed: Which of them need a gradient.
        gradient: Of the output.
    """
    with torch.enable_grad():
        output = law(*inputs)
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]
