"""The linear function computes the law, whichever way it chooses, with exact gradients of every order."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import dropout as masks
from lora_plugins.kernels import linear
from lora_plugins.kernels.linear import lora_linear

MANY, FEW = (3, 16), (1, 2)  # rows: the update is added to the weight, or to the output
SHAPES = {
    "update_first": (MANY, 5, 1),
    "update_first_wide": (MANY, 9, 1),
    "update_first_and_high_rank": (MANY, 9, 4),  # the gradient of the whole weight is cheaper
    "small_products": (FEW, 5, 2),
    "small_products_wide": (FEW, 9, 2),
}

shapes = pytest.mark.parametrize(("lead", "outputs", "r"), SHAPES.values(), ids=SHAPES)
drops = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])


def tensors(lead: tuple[int, ...], outputs: int, r: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(*lead, 6), (outputs, 6), (outputs,), (r, 6), (outputs, r)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def seeded(dropout: float):
    def compute(*inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return lora_linear(*inputs, 1.7, dropout)

    return compute


def law(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, weight + 1.7 * B @ A, bias)


def test_the_shapes_of_this_file_take_both_ways():
    for outputs in (5, 9):
        assert linear.update_is_cheaper(48, 6, outputs)
        assert not linear.update_is_cheaper(2, 6, outputs)
    high = {name: linear._rank_is_high(48, torch.empty(r, 6), torch.empty(n, r)) for name, (_, n, r) in SHAPES.items()}
    assert [name for name in SHAPES if high[name] and "first" in name] == ["update_first_and_high_rank"]


@shapes
@drops
def test_gradients_of_first_and_second_order(lead, outputs, r, dropout):
    inputs = tensors(lead, outputs, r)
    assert torch.autograd.gradcheck(seeded(dropout), inputs)
    assert torch.autograd.gradgradcheck(seeded(dropout), inputs)


@shapes
def test_it_is_the_law(lead, outputs, r):
    inputs = tensors(lead, outputs, r)
    torch.testing.assert_close(lora_linear(*inputs, 1.7, 0.0), law(*inputs), rtol=1e-13, atol=1e-13)


@shapes
@drops
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_inputs_may_be_at_another_axis(lead, outputs, r, dropout, last):
    _, *others = tensors(lead, outputs, r)
    image = torch.randn(lead[0], 6, lead[1], 1, dtype=torch.float64)
    image = image.contiguous(memory_format=torch.channels_last) if last else image

    def compute(*inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return lora_linear(*inputs, 1.7, dropout, axis=1)

    inputs = [image.requires_grad_(), *others]
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs, fast_mode=True)
    if not dropout:
        expected = law(image.movedim(1, -1), *others).movedim(-1, 1)
        torch.testing.assert_close(compute(*inputs), expected, rtol=1e-13, atol=1e-13)


@shapes
@drops
@pytest.mark.parametrize("needed", range(5), ids=["x", "weight", "bias", "A", "B"])
def test_one_gradient_alone_is_the_same(lead, outputs, r, dropout, needed):
    inputs = tensors(lead, outputs, r)
    expected = torch.autograd.grad(seeded(dropout)(*inputs).sin().sum(), inputs)
    alone = [tensor.detach().requires_grad_(i == needed) for i, tensor in enumerate(inputs)]
    (gradient,) = torch.autograd.grad(seeded(dropout)(*alone).sin().sum(), [alone[needed]])
    torch.testing.assert_close(gradient, expected[needed], rtol=1e-13, atol=1e-13)


@shapes
@pytest.mark.parametrize("at_once", [1, 60], ids=["row_by_row", "some_rows"])
@pytest.mark.parametrize("adapter", [torch.float64, torch.float32], ids=str)
def test_rows_may_be_dropped_in_parts(lead, outputs, r, at_once, adapter, monkeypatch):
    x, weight, bias, *factors = tensors(lead, outputs, r)
    inputs = [x, weight, bias, *(factor.detach().to(adapter).requires_grad_() for factor in factors)]
    found, gradient = [], torch.randn(*lead, outputs, dtype=torch.float64)
    for elements in (at_once, 2**20):
        monkeypatch.setattr(masks, "_AT_ONCE", elements)
        output = seeded(0.3)(*inputs)
        found.append([output, *torch.autograd.grad(output, inputs, gradient)])
    error = 64 * torch.finfo(adapter).eps  # of sums of up to 48 rows
    torch.testing.assert_close(*found, rtol=error, atol=error)


UNUSUAL = {
    "one_row": lambda: torch.randn(6),
    "no_row": lambda: torch.randn(0, 6),
    "transposed": lambda: torch.randn(6, 30).T,
    "permuted": lambda: torch.randn(4, 6, 7).transpose(1, 2),
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_inputs(make):
    _, *others = tensors(MANY, 9, 1, torch.float32)
    x = make()
    torch.testing.assert_close(lora_linear(x, *others, 1.7, 0.0), law(x, *others))


@pytest.mark.parametrize("make", [UNUSUAL["transposed"], UNUSUAL["permuted"]], ids=["transposed", "permuted"])
@drops
def test_the_gradient_of_the_input_has_its_memory_format(make, dropout):
    _, *others = tensors(MANY, 5, 1, torch.float32)
    x = make().requires_grad_()
    (gradient,) = torch.autograd.grad(lora_linear(x, *others, 1.7, dropout).sum(), x)
    assert gradient.stride() == x.stride()


@shapes
@drops
@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_a_graph_of_the_gradients_has_the_same_gradients(lead, outputs, r, dropout, make):
    _, *others = tensors(lead, outputs, r)
    inputs = [make().double().requires_grad_(), *others]
    found = [
        torch.autograd.grad(seeded(dropout)(*inputs).sin().sum(), inputs, create_graph=graph) for graph in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@shapes
@drops
def test_autocast_agrees_with_float32(lead, outputs, r, dropout):
    inputs = tensors(lead, outputs, r, torch.float32)
    expected = torch.autograd.grad(seeded(dropout)(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = seeded(dropout)(*inputs)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().square().sum(), inputs)
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.dtype == torch.float32
        # bfloat16 has 8 bits; sums of some dozen products keep about 5 of them
        assert (got - wanted).norm() < 0.03 * wanted.norm()


@shapes
def test_a_small_update_of_a_half_precision_weight_is_not_rounded_away(lead, outputs, r):
    x, weight, _, A, B = tensors(lead, outputs, r, torch.float32)
    small = B.detach() * 1e-3
    x = x.detach().bfloat16() * 0 + 1
    output = lora_linear(x, torch.full_like(weight, 256).bfloat16(), None, A, small, 1.0, 0.0)
    base = F.linear(x, torch.full_like(weight, 256).bfloat16())
    expected = base + F.linear(F.linear(x.float(), A), small).bfloat16()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@drops
def test_only_the_input_is_kept(dropout):
    inputs = tensors(MANY, 9, 1, torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(*inputs, 1.7, dropout)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= known
