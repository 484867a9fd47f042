"""Whether plain eager mode is at work, in which functions with a hand-written gradient may be used.

torch has no public way of asking this: its private names for it are in this file and in `utils.transforms`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lora_plugins.kernels._kernel import missing_from_torch
from lora_plugins.kernels.update import Update
from lora_plugins.utils import autocast_dtype, transforms_are_active


def eager_is_unknown() -> str:
    """Says why `is_eager` cannot tell; empty if it can. A kernel that needs it is not available otherwise."""
    return missing_from_torch(
        "_C._are_functorch_transforms_active",
        "autograd.forward_ad._current_level",
        "utils._python_dispatch._get_current_dispatch_mode",
        "utils._python_dispatch.is_traceable_wrapper_subclass",
        "_C._functorch.is_legacy_batchedtensor",
    )


def is_eager(x: Tensor) -> bool:
    """Whether operations on `x` run now, one by one: no transform, dual numbers, or tensors without strides or values.

    Nor a tensor that is made of others, such as those that are split over processes.

    The dispatch of an operation has already excluded compilers and `torch.jit.trace`.
    """
    return not (
        x.is_meta
        or x.is_nested
        or x.layout is not torch.strided
        or transforms_are_active()
        or torch.utils._python_dispatch.is_traceable_wrapper_subclass(x)
        or torch.utils._python_dispatch._get_current_dispatch_mode() is not None
    )


def needs_law(gradient: Tensor) -> bool:
    """Whether a backward is to be made of ordinary operations: it is differentiated, or of many gradients at once.

    Args:
        gradient: Of the output; with `is_grads_batched`, as of vectorized Jacobians, torch gives many in one tensor.
    """
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def types_agree(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's own layer computes with such types. Otherwise it is called, and its error says what is wrong."""
    if autocast_dtype(x) is not None:  # which leaves integers and double precision alone
        return x.is_floating_point() and weight.dtype != torch.float64
    return x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)


def applies_in_eager_mode(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, *_: object, **__: object
) -> bool:
    """Whether a kernel for plain eager mode computes a call, which torch's own layer has to be able to compute.

    What it leaves to torch are layers without inputs or outputs, inputs without dimensions or with empty rows, and
    dropout that is recorded in a CUDA graph: masks come from a seed of the host, which every replay would share.
    """
    recorded = update.dropout and x.is_cuda and torch.cuda.is_current_stream_capturing()
    return (
        is_eager(x)
        and types_agree(x, weight, bias)
        and weight.numel() > 0
        and min(x.shape[1:] or x.shape, default=0) > 0
        and not recorded
    )


def raw_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns what applies a function in eager mode.

    `Function.apply` itself first looks for wrappers of functorch, of which `is_eager` has said that there are none. In
    inference mode, a module may switch gradients on: torch's own operations ignore that, and cannot save anything.
    """
    apply = cast(Callable[..., Any], super(torch.autograd.Function, function).apply)  # type: ignore[misc]

    def applied(*args: Any) -> Any:
        if not (torch.is_inference_mode_enabled() and torch.is_grad_enabled()):
            return apply(*args)
        with torch.no_grad():
            return apply(*args)

    return applied
