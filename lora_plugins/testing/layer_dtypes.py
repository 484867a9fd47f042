"""Checks of an adapted layer in half precision and under autocast."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lora_plugins.inplace import factors, layer_state
from lora_plugins.testing.check import Check, require, require_all_close, tensors_of
from lora_plugins.testing.layer_case import Holder, LayerCase, adapter_leaves, call, lawful, runs

NEAR = 0.05
"""What an output in half precision may be off by, as a share of the largest value: a few times its rounding."""

HALVES = (torch.bfloat16, torch.float16)


def cancelling(case: LayerCase, dtype: torch.dtype, rounded: str) -> Holder:
    """Builds a model whose two ranks cancel each other but for an eighth of the rounding of a half precision.

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


def _dtype(case: LayerCase) -> None:
    for dtype in HALVES:
        _on_a_base_of(case, dtype)
    model = case.adapted(torch.float32).double().eval()
    inputs = case.arguments(model.layer)
    require_all_close("the output after model.double()", call(model, inputs), call(lawful(case, model), inputs))
    _under_autocast(case)


def _on_a_base_of(case: LayerCase, dtype: torch.dtype) -> None:
    model = case.adapted(dtype).eval()
    kinds = {parameter.dtype for parameter in adapter_leaves(model.layer)}
    require(kinds == {torch.float32}, f"A and B on a base of {dtype} are of {kinds}")
    inputs = case.arguments(model.layer)
    if not runs(case.model(dtype).eval(), inputs):
        return
    require_all_close(f"the output of a base of {dtype}", call(model, inputs), call(lawful(case, model), inputs), NEAR)
    _learns(model, inputs, f"on a base of {dtype}")
    for rounded in "AB":
        model = cancelling(case, dtype, rounded)
        what = f"the output of a base of {dtype}, whose factors in float32 nearly cancel,"
        require_all_close(what, call(model, inputs), call(lawful(case, model), inputs), NEAR)


def _under_autocast(case: LayerCase) -> None:
    model, untouched = case.adapted(torch.float32), case.model(torch.float32)
    inputs = case.arguments(model.layer)
    for training in (False, True):
        with torch.autocast(case.device.type, torch.bfloat16):
            if not runs(untouched.train(training), inputs):
                return
            got, expected = call(model.train(training), inputs), call(lawful(case, model), inputs)
        require_all_close("the output under autocast", got, expected, NEAR)
    _learns(model, inputs, "under autocast", autocast=True)


def _learns(model: nn.Module, inputs: tuple[Any, ...], where: str, *, autocast: bool = False) -> None:
    """Requires that a backward gives A and B finite gradients of their own type."""
    leaves = adapter_leaves(model.layer)  # type: ignore[arg-type]
    with torch.autocast(leaves[0].device.type, torch.bfloat16) if autocast else nullcontext():
        outputs = tensors_of(call(model.train(), inputs))
    total = torch.stack([output.float().sum() for output in outputs if output.requires_grad]).sum()
    for gradient in torch.autograd.grad(total, leaves):
        require(bool(gradient.isfinite().all()), f"{where} the gradient of A or B has values that are not finite")
    model.eval()


DTYPE_CHECKS: tuple[Check[LayerCase], ...] = (
    Check(
        "dtype",
        _dtype,
        "A and B are float32 on a base in half precision and are used as such, the output keeps the base's type, also "
        "under autocast, and A and B follow model.double()",
        "branch returns the type of A instead of that of the untouched output, or casts A and B to that of x: cast x "
        "to the type of A, and end with y + update.to(y.dtype).",
    ),
)
