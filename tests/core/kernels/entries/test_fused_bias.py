"""Large products in bfloat16 with a bias go to oneDNN, where it is right and nothing else is wanted."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from lora_plugins.kernels import DISABLE_VARIABLE, disabled_kernels, kernel_report, linear_2d

pytest.importorskip("lora_plugins.kernels.entries.fused_bias")

X, WEIGHT, BIAS = (torch.randn(shape).bfloat16() for shape in [(260, 72), (64, 72), (64,)])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As inside of autograd functions, on a machine that has the kernel."""
    reasons = {status.name: status.reason for status in kernel_report()}
    if DISABLE_VARIABLE in os.environ or reasons["fused_bias"]:
        pytest.skip(reasons["fused_bias"] or f"{DISABLE_VARIABLE} is set")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT.T.contiguous().T], ids=["plain", "transposed"])
def test_a_large_product_is_rounded_once(weight, calls):
    exact = F.linear(X.double(), weight.double(), BIAS.double())
    found = linear_2d(X, weight, BIAS)
    assert calls == [X.shape]
    assert found.dtype == torch.bfloat16
    # Half a unit in the last place, and what adding up 72 products in float32 leaves.
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() * (1 + 2**-8) + 1e-4).all()


STAYS = {
    "no_bias": (X, WEIGHT, None),
    "small": (X[:2], WEIGHT, BIAS),
    "part_of_a_weight": (X, torch.randn(64, 80).bfloat16()[:, :72], BIAS),
    "strided_bias": (X, WEIGHT, torch.randn(128).bfloat16()[::2]),
    "float16": (X.half(), WEIGHT.half(), BIAS.half()),
    "float64": (X.double(), WEIGHT.double(), BIAS.double()),
}


@pytest.mark.parametrize(("x", "weight", "bias"), STAYS.values(), ids=STAYS)
def test_what_it_does_not_suit_stays_with_torch(x, weight, bias, calls):
    assert torch.equal(linear_2d(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


def test_it_can_be_switched_off(monkeypatch, calls):
    with disabled_kernels("fused_bias"):
        linear_2d(X, WEIGHT, BIAS)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear_2d(X, WEIGHT, BIAS)
    assert not calls


def test_what_needs_a_gradient_stays_with_torch(calls):
    weight = WEIGHT.clone().requires_grad_()
    with torch.enable_grad():
        linear_2d(X, weight, BIAS).sum().backward()
    assert weight.grad is not None
    assert not calls
