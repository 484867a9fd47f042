"""Checks of an adapted layer in half precision and under autocast."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.inplace import factors, layer_state
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.layer_case import (
    Holder,
    LayerCase,
    adapter_leaves,
    call,
    lawful,
    named_leaves,
    require_lawful,
    runs,
)
from lora_plugins.testing.required import real_tensors_of, require, uneven_sum
from lora_plugins.utils import in_float64

NEAR = 0.05
"""What an output in half precision may be off by, as a share of the largest value: a few times its rounding."""

_LIKE, _OFF = 3, 0.1
"""How many times the error of the untouched layer, and which share of its norm, a gradient may be off by besides."""

HALVES = (torch.bfloat16, torch.float16)


def cancelling(case: LayerCase, dtype: torch.dtype, rounded: str) -> Holder:
    """Builds a model whose two ranks cancel each other except for an eighth of the rounding of a half precision.

    The scaling makes that difference the update. Factors in float32 have it to four digits; of factors, or of A(x), in
    half precision it is nothing but rounding.

    Args:
        case: What is checked.
        dtype: The half precision, which is the type of the base.
        rounded: The factor that has the difference, `A` or `B`.
    """
    difference = torch.finfo(dtype).eps / 8
    model = case.adapted(dtype, r=2, alpha=2 / difference).eval()
    with torch.no_grad():
        for slot in layer_state(model.layer).adapters["default"].slots:
            A, B = factors(model.layer, "default", slot)
            A.copy_(torch.randn_like(A[:1]).expand_as(A))
            B.copy_(torch.randn_like(B[:, :1]).expand_as(B))
            (A[1] if rounded == "A" else B[:, 1]).mul_(1 + difference)
            B[:, 1].neg_()
    return model


@as_check(
    "dtype",
    "A and B are float32 on a base in half precision, are used as such and get the gradients of the law, the output "
    "keeps the base's type, also under autocast, and A and B follow model.double()",
    "branch returns the type of A instead of that of the untouched output, or casts A and B to that of x: cast x "
    "to the type of A, and end with y + update.to(y.dtype).",
)
def _dtype(case: LayerCase) -> None:
    for dtype in HALVES:
        _on_a_base_of(case, dtype)
    model = case.adapted(torch.float32).double().eval()
    inputs = case.arguments(model.layer)
    require_lawful("the output after model.double()", case, model, inputs)
    _under_autocast(case)


def _on_a_base_of(case: LayerCase, dtype: torch.dtype) -> None:
    model = case.adapted(dtype).eval()
    kinds = {parameter.dtype for parameter in adapter_leaves(model.layer)}
    require(kinds == {torch.float32}, f"A and B on a base of {dtype} are of {kinds}")
    inputs = case.arguments(model.layer)
    if not runs(case.model(dtype).eval(), inputs):
        return
    require_lawful(f"the output of a base of {dtype}", case, model, inputs, NEAR)
    _learns(case, model, inputs, dtype, f"on a base of {dtype}")
    for rounded in "AB":
        model = cancelling(case, dtype, rounded)
        what = f"the output of a base of {dtype}, whose factors in float32 nearly cancel,"
        require_lawful(what, case, model, inputs, NEAR)


def _under_autocast(case: LayerCase) -> None:
    model, untouched = case.adapted(torch.float32), case.model(torch.float32)
    inputs = case.arguments(model.layer)
    for training in (False, True):
        with torch.autocast(case.device.type, torch.bfloat16):
            if not runs(untouched.train(training), inputs):
                return
            require_lawful("the output under autocast", case, model.train(training), inputs, NEAR)
    _learns(case, model, inputs, torch.float32, "under autocast", autocast=True)


def _learns(
    case: LayerCase, model: Holder, inputs: tuple[Any, ...], dtype: torch.dtype, where: str, *, autocast: bool = False
) -> None:
    """Requires that a backward gives A and B the gradients of the law, wherever the untouched layer has a backward.

    They may be off by what half precision costs the untouched layer with the updated weights, a few times.
    """
    leaves = named_leaves(model.layer)
    untouched = case.model(dtype)
    try:
        _gradients(untouched, inputs, [*untouched.parameters()], autocast)
    except Exception:  # torch has no class for all that can go wrong here
        return
    wide = case.adapted(dtype).double()
    exact = _gradients(lawful(case, wide), case.arguments(wide.layer), [*named_leaves(wide.layer).values()])
    reference = _gradients(lawful(case, model), inputs, [*leaves.values()], autocast)
    got = _gradients(model, inputs, [*leaves.values()], autocast)
    for name, found, like, true in zip(leaves, got, reference, exact, strict=True):
        finite = found is not None and bool(found.isfinite().all())
        require(finite, f"{where} {name} gets no gradient that is finite")
        norm, off, cost = _norm(true), _norm(found, true), _norm(like, true)
        # Written so that a reference that is not finite asks for nothing.
        wrong = off > _LIKE * cost + _OFF * norm
        require(not wrong, f"{where} the gradient of {name}, of norm {norm:.2g}, is off by {off:.2g}")
    model.eval()


def _norm(gradient: Tensor | None, other: Tensor | None = None) -> float:
    """Returns the norm of a gradient, or of its difference from another; None is zero."""
    given = [in_float64(each) for each in (gradient, other) if each is not None]
    return float(torch.sub(*given).norm()) if len(given) == 2 else sum(float(each.norm()) for each in given)


def _gradients(
    model: nn.Module, inputs: tuple[Any, ...], leaves: Sequence[Tensor], autocast: bool = False
) -> Sequence[Tensor | None]:
    with torch.autocast(leaves[0].device.type, torch.bfloat16) if autocast else nullcontext():
        outputs = real_tensors_of(call(model.train(), inputs))
    total = torch.stack([uneven_sum(in_float64(output)) for output in outputs if output.requires_grad]).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True)


DTYPE_CHECKS: tuple[Check[LayerCase], ...] = (_dtype,)
