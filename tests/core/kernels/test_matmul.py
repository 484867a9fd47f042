"""Products are right in every layout, also large ones in float32, which another library computes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels.channels import contract
from lora_plugins.kernels.linear import lora_linear
from lora_plugins.kernels.matmul import add_product, linear, matmul, project

SIZES = {"small": (30, 7, 5), "large": (260, 72, 64)}  # rows, inputs and outputs: below and above what suits oneDNN

LAYOUTS = {
    "contiguous": torch.randn,
    "transposed": lambda rows, columns: torch.randn(columns, rows).T,
    "part": lambda rows, columns: torch.randn(rows, columns + 3)[:, :columns],
    "part_of_transposed": lambda rows, columns: torch.randn(columns, rows + 3).T[:rows],
}

sizes = pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES.values(), ids=SIZES)
lefts = pytest.mark.parametrize("left", LAYOUTS.values(), ids=LAYOUTS)
rights = pytest.mark.parametrize("right", LAYOUTS.values(), ids=LAYOUTS)


def assert_exact(got: Tensor, wanted: Tensor) -> None:
    """Compares with a result in float64, relative to its largest element: sums of 2000 products keep six digits."""
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() < 4e-6 * wanted.abs().max()


@sizes
@lefts
@rights
@pytest.mark.parametrize("bias", [None, "whole", "strided"])
def test_linear(rows, inputs, outputs, left, right, bias):
    x, weight = left(rows, inputs), right(outputs, inputs)
    b = {None: None, "whole": torch.randn(outputs), "strided": torch.randn(2 * outputs)[::2]}[bias]
    assert_exact(linear(x, weight, b), F.linear(x.double(), weight.double(), None if b is None else b.double()))


@sizes
@lefts
@rights
def test_matmul_and_contract(rows, inputs, outputs, left, right):
    x, matrix, dy = left(rows, inputs), right(inputs, outputs), right(rows, outputs)
    assert_exact(matmul(x, matrix), x.double() @ matrix.double())
    assert_exact(contract(x, dy), x.double().T @ dy.double())
    assert_exact(contract(dy, x), dy.double().T @ x.double())


@sizes
@rights
def test_update_and_its_gradients(rows, inputs, outputs, right):
    weight, A, B = right(rows, outputs), torch.randn(inputs, outputs), torch.randn(rows, inputs)
    untouched = weight.clone()
    assert_exact(add_product(weight, B, A, 1.7), weight.double() + 1.7 * B.double() @ A.double())
    dA, dB = project(weight, A, B, 1.7)
    assert_exact(dA, 1.7 * B.double().T @ weight.double())
    assert_exact(dB, 1.7 * weight.double() @ A.double().T)
    assert torch.equal(weight, untouched)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As inside of autograd functions."""
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """The shapes that oneDNN's function is called with."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("products are torch's on this processor")
    shapes = []
    original = torch.ops.mkldnn._linear_pointwise.default

    class Spy:
        @staticmethod
        def default(x: Tensor, *others: object) -> Tensor:
            shapes.append(x.shape)
            return original(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Spy)
    return shapes


WAYS = {
    "update_first": (2000, 64, 16, 0.0),
    "high_rank": (2000, 64, 60, 0.0),
    "few_rows": (30, 500, 80, 0.0),
    "dropout": (2000, 64, 16, 0.3),
}


@pytest.mark.parametrize(("rows", "inputs", "r", "dropout"), WAYS.values(), ids=WAYS)
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
            y = lora_linear(x, *others, 1.7, dropout, axis=axis)
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
    "bfloat16": (X.bfloat16(), WEIGHT.bfloat16(), BIAS.bfloat16()),
}


@pytest.mark.parametrize(("x", "weight", "bias"), STAYS.values(), ids=STAYS)
def test_what_onednn_does_not_suit_stays_with_torch(x, weight, bias, calls):
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


def test_a_user_can_turn_onednn_off(monkeypatch, calls):
    linear(X, WEIGHT, BIAS)
    assert calls == [X.shape]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear(X, WEIGHT, BIAS)
    assert calls == [X.shape]


def test_what_needs_a_gradient_stays_with_torch(calls):
    weights = [WEIGHT.clone().requires_grad_() for _ in range(2)]
    with torch.enable_grad():
        for weight, compute in zip(weights, (linear, F.linear), strict=True):
            compute(X, weight, BIAS).sum().backward()
    assert torch.equal(weights[0].grad, weights[1].grad)
    assert not calls
