"""Large products in float32 go to oneDNN, where it is right and nothing else is wanted."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import DISABLE_VARIABLE, _switches, disabled_kernels, linear_2d
from lora_plugins.kernels._onednn import unavailable
from tests.core.kernels.linear_cases import linear
from tests.core.kernels.needs import needs

onednn = pytest.importorskip("lora_plugins.kernels.entries.onednn")


@pytest.fixture(autouse=True)
def another_maker(monkeypatch) -> None:
    """As on a processor that is not of Intel, where the kernel would not be used."""
    if DISABLE_VARIABLE in os.environ:
        pytest.skip(f"{DISABLE_VARIABLE} is set")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the processor has no AVX512")
    if reason := unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(onednn, "_processor", lambda: "AuthenticAMD")
    switches = _switches._Switches(_switches._entries())
    monkeypatch.setattr(_switches, "_switches", lambda: switches)


def test_it_is_not_used_on_processors_of_intel(monkeypatch):
    monkeypatch.setattr(onednn, "_processor", lambda: "vendor_id : GenuineIntel")
    assert onednn.available() == "on processors of Intel, MKL is as fast"


def test_it_is_used_with_avx512_alone(monkeypatch):
    assert not onednn.available()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert onednn.available() == "it needs a processor with AVX512, and torch uses AVX2 of this one"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As inside of autograd functions."""
    with torch.no_grad():
        yield


PATHS = {
    "effective_weight_first": (2000, 64, 16, 0.0),
    "high_rank": (2000, 64, 60, 0.0),
    "large_factors": (600, 512, 64, 0.0),
    "few_rows": (30, 500, 80, 0.0),
    "dropout": (2000, 64, 16, 0.3),
}


@needs("fused_linear")
@pytest.mark.parametrize(("rows", "inputs", "r", "dropout"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("axis", [-1, 1], ids=["rows", "image"])
def test_a_large_layer_in_float32_computes_the_law(rows, inputs, r, dropout, axis, calls):
    torch.manual_seed(0)
    shapes = [(rows, inputs), (72, inputs), (72,), (r, inputs), (72, r)]
    exact = [(torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]

    def run(*tensors: Tensor) -> list[Tensor]:
        torch.manual_seed(7)
        x, *others = tensors
        with torch.enable_grad():
            x = x if axis == -1 else x.view(2, -1, 1, inputs).movedim(-1, 1)
            y = linear(x, *others, 1.7, dropout, axis=axis)
            return [y, *torch.autograd.grad(y.sin().sum(), tensors)]

    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    results = run(*single)
    assert calls
    for got, wanted in zip(results, run(*exact), strict=True):
        assert (got - wanted).norm() < 3e-6 * wanted.norm()


X, WEIGHT, BIAS = torch.randn(260, 72), torch.randn(64, 72), torch.randn(64)


class OwnTensor(Tensor):
    """Says itself how it is multiplied."""


STAYS = {
    "small": (X[:2], WEIGHT, BIAS),
    "part_of_a_weight": (X, torch.randn(64, 80)[:, :72], BIAS),
    "strided_bias": (X, WEIGHT, torch.randn(128)[::2]),
    "subclass": (X, WEIGHT.as_subclass(OwnTensor), BIAS),
    "float64": (X.double(), WEIGHT.double(), BIAS.double()),
    "bfloat16": (X.bfloat16(), WEIGHT.bfloat16(), None),
}


@pytest.mark.parametrize(("x", "weight", "bias"), STAYS.values(), ids=STAYS)
def test_what_onednn_does_not_suit_stays_with_torch(x, weight, bias, calls):
    assert torch.equal(linear_2d(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


WRONG = {"columns": (X[:, :71], WEIGHT, BIAS), "type_of_bias": (X, WEIGHT, BIAS.double())}


@pytest.mark.parametrize(("x", "weight", "bias"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_by_torch(x, weight, bias, calls):
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|same dtype"):
        linear_2d(x, weight, bias)
    assert not calls


def test_a_user_can_turn_onednn_off(monkeypatch, calls):
    linear_2d(X, WEIGHT, BIAS)
    assert calls == [X.shape]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear_2d(X, WEIGHT, BIAS)
    assert calls == [X.shape]


def test_what_needs_a_gradient_stays_with_torch(calls):
    weights = [WEIGHT.clone().requires_grad_() for _ in range(2)]
    with torch.enable_grad():
        for weight, compute in zip(weights, (linear_2d, F.linear), strict=True):
            compute(X, weight, BIAS).sum().backward()
    assert torch.equal(weights[0].grad, weights[1].grad)
    assert not calls


def test_it_can_be_switched_off(calls):
    with disabled_kernels("onednn"):
        linear_2d(X, WEIGHT, BIAS)
    assert not calls
    linear_2d(X, WEIGHT, BIAS)
    assert calls == [X.shape]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_tracers_and_compilers_see_ordinary_products(calls):
    traced = torch.jit.trace(lambda x: linear_2d(x, WEIGHT, BIAS), X, check_trace=False)  # which runs it in eager mode
    compiled = torch.compile(lambda x: linear_2d(x, WEIGHT, BIAS), backend="aot_eager", fullgraph=True)
    mapped = torch.func.vmap(lambda row: linear_2d(row.expand(260, 72), WEIGHT, BIAS)[0])
    for compute in (traced, compiled, mapped):
        torch.testing.assert_close(compute(X), F.linear(X, WEIGHT, BIAS))
    assert not calls
