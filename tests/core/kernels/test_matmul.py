"""Products are right in every layout, also large ones in float32, which another library computes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels.matmul import effective_weight, factor_gradients, linear_2d, matmul, transposed_product

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
    assert_exact(linear_2d(x, weight, b), F.linear(x.double(), weight.double(), None if b is None else b.double()))


@sizes
@lefts
@rights
def test_matmul_and_transposed_product(rows, inputs, outputs, left, right):
    x, matrix, dy = left(rows, inputs), right(inputs, outputs), right(rows, outputs)
    assert_exact(matmul(x, matrix), x.double() @ matrix.double())
    assert_exact(transposed_product(x, dy), x.double().T @ dy.double())
    assert_exact(transposed_product(dy, x), dy.double().T @ x.double())


@sizes
@rights
def test_effective_weight_and_its_gradients(rows, inputs, outputs, right):
    weight, A, B = right(rows, outputs), torch.randn(inputs, outputs), torch.randn(rows, inputs)
    untouched = weight.clone()
    assert_exact(effective_weight(weight, A, B, 1.7, torch.float32), weight.double() + 1.7 * B.double() @ A.double())
    dA, dB = factor_gradients(weight, A, B, 1.7)
    assert_exact(dA, 1.7 * B.double().T @ weight.double())
    assert_exact(dB, 1.7 * weight.double() @ A.double().T)
    assert torch.equal(weight, untouched)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As inside of autograd functions."""
    with torch.no_grad():
        yield
