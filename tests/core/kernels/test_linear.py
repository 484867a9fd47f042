"""A linear layer with an update computes the law, whatever computes it, with exact gradients of every order."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import disabled_kernels
from tests.core.kernels.linear_cases import MANY, UNUSUAL, drops, law, linear, seeded, shapes, tensors

# Whole Jacobians take seconds each; the fast tests look at products with random vectors.
jacobians = pytest.mark.parametrize(
    "projected", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "whole"]
)


@shapes
@drops
@jacobians
def test_gradients_of_first_and_second_order(lead, outputs, r, dropout, projected):
    inputs = tensors(lead, outputs, r)
    assert torch.autograd.gradcheck(seeded(dropout), inputs, fast_mode=projected)
    assert torch.autograd.gradgradcheck(seeded(dropout), inputs, fast_mode=projected)


@shapes
def test_it_is_the_law(lead, outputs, r):
    inputs = tensors(lead, outputs, r)
    found, expected = linear(*inputs, 1.7, 0.0), law(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(output.sin().sum(), inputs) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@shapes
@drops
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@jacobians
def test_inputs_may_be_at_another_axis(lead, outputs, r, dropout, last, projected):
    _, *others = tensors(lead, outputs, r)
    image = torch.randn(lead[0], 6, lead[1], 1, dtype=torch.float64)
    image = image.contiguous(memory_format=torch.channels_last) if last else image

    def compute(*inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return linear(*inputs, 1.7, dropout, axis=1)

    inputs = [image.requires_grad_(), *others]
    assert torch.autograd.gradcheck(compute, inputs, fast_mode=projected)
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


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_inputs(make):
    _, *others = tensors(MANY, 9, 1, torch.float32)
    x = make()
    torch.testing.assert_close(linear(x, *others, 1.7, 0.0), law(x, *others))


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
    output = linear(x, torch.full_like(weight, 256).bfloat16(), None, A, small, 1.0, 0.0)
    base = F.linear(x, torch.full_like(weight, 256).bfloat16())
    expected = base + F.linear(F.linear(x.float(), A), small).bfloat16()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@shapes
@drops
@pytest.mark.parametrize("kernels", [[], ["all"]], ids=["kernels", "ordinary"])
@pytest.mark.parametrize(
    # bfloat16 has 8 bits; products, of which sums of some dozen are made, keep about 6 of them
    ("dtype", "tolerance"),
    [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["bf16", "fp16"],
)
def test_the_update_of_a_weight_in_half_precision(lead, outputs, r, dropout, dtype, tolerance, kernels):
    x, weight, _, A, B = tensors(lead, outputs, r)
    x, weight = x.detach().to(dtype).requires_grad_(), torch.zeros_like(weight)
    # What is left is the update alone; its factor makes up for a B of which float16 alone has no digit.
    scaling, A, B = 1.7e6, A.detach().float().requires_grad_(), (B.detach() * 1e-8).float().requires_grad_()
    found = []
    for some in ((x, weight.to(dtype), None, A, B), (x.double(), weight, None, A.double(), B.double())):
        with disabled_kernels(*kernels):
            torch.manual_seed(7)
            output = linear(*some, scaling, dropout)
        found.append([output, *torch.autograd.grad(output.double().square().sum(), (x, A, B))])
    for got, wanted in zip(*found, strict=True):
        assert (got.double() - wanted.double()).norm() < tolerance * wanted.double().norm()


@shapes
@drops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_factors_that_nearly_cancel_beside_a_weight_in_half_precision(lead, outputs, r, dropout, dtype):
    x, weight, _, A, B = (tensor.detach() for tensor in tensors(lead, outputs, r))
    A, B = torch.cat([A, A]).float(), torch.cat([B, -B + 3e-3 * torch.randn_like(B)], dim=1).float()
    half = [x.to(dtype), torch.zeros_like(weight).to(dtype), None, A, B]
    found = []
    for some in (half, [None if tensor is None else tensor.double() for tensor in half]):
        torch.manual_seed(7)
        found.append(linear(*some, 1.7, dropout).double())
    got, wanted = found
    # the output has 8 or 11 bits, and what cancels is 300 times as large
    assert (got - wanted).norm() < 0.02 * wanted.norm()


@shapes
def test_ordinary_operations_are_the_law(lead, outputs, r):
    found = []
    for compute in (seeded(0.0), law):
        inputs = tensors(lead, outputs, r)
        with disabled_kernels("all"):
            output = compute(*inputs)
        found.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@shapes
def test_ordinary_operations_drop_elements_of_the_branch_only(lead, outputs, r):
    inputs = [tensor.detach() for tensor in tensors(lead, outputs, r)]
    x, weight, bias, *_ = inputs
    with disabled_kernels("all"):
        dropped = torch.stack([linear(*inputs, 1.7, 0.5) for _ in range(1000)])
    branch = law(*inputs) - F.linear(x, weight, bias)
    assert dropped.std(0).min() > 0
    # a mean of 1000 draws of 6 inputs, each of which is there or not
    assert (dropped.mean(0) - F.linear(x, weight, bias) - branch).abs().mean() < 0.2 * branch.abs().mean()
