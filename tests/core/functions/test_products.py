"""Products are right in every layout, also large ones in float32, which another library computes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.functions.linear import lora_linear
from lora_plugins.functions.products import add_product, contract, linear, matmul, project

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


WAYS = {
    "update_first": (2000, 16, 0.0),
    "high_rank": (2000, 60, 0.0),
    "few_rows": (30, 60, 0.0),
    "dropout": (2000, 16, 0.3),
}


@pytest.mark.parametrize(("rows", "r", "dropout"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("axis", [-1, 1], ids=["rows", "image"])
def test_a_large_layer_in_float32_computes_the_law(rows, r, dropout, axis):
    torch.manual_seed(0)
    shapes = [(rows, 64), (72, 64), (72,), (r, 64), (72, r)]
    exact = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*inputs: Tensor) -> list[Tensor]:
        torch.manual_seed(7)
        x, *others = inputs
        x = x if axis == -1 else x.view(2, -1, 1, 64).movedim(-1, 1)
        y = lora_linear(x, *others, 1.7, dropout, axis=axis)
        gradients = torch.autograd.grad(y.sin().sum(), inputs)
        return [y, *gradients]

    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    for got, wanted in zip(run(*single), run(*exact), strict=True):
        # The sine of outputs of some hundred is as exact as they are: their sixth digit moves it by a thousandth.
        assert (got - wanted).norm() < 1e-4 * wanted.norm()


def test_tensors_with_a_product_of_their_own_keep_it():
    class Halves(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return (
                "its own" if function is F.linear else super().__torch_function__(function, types, args, kwargs or {})
            )

    weight = torch.randn(64, 72).as_subclass(Halves)
    assert linear(torch.randn(260, 72), weight) == "its own"


def test_a_user_can_turn_onednn_off(monkeypatch):
    x, weight = torch.randn(260, 72), torch.randn(64, 72)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
