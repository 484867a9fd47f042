"""A convolution with an update computes the law, whatever computes it, with exact gradients of every order."""

import torch
from torch.nn import functional as F

from lora_plugins.kernels import disabled_kernels
from tests.core.kernels.conv_cases import CASES, WITHOUT_DROPOUT, Case, cases, in_both_formats


@in_both_formats(CASES)
def test_gradients(case: Case, last: bool):
    assert torch.autograd.gradcheck(case.compute, case.tensors(channels_last=last), fast_mode=True)


@cases
def test_gradients_of_second_order(case: Case):
    assert torch.autograd.gradgradcheck(case.compute, case.tensors(), fast_mode=True)


@cases
def test_one_gradient_alone_is_the_same(case: Case):
    inputs = case.tensors()
    expected = torch.autograd.grad(case.compute(*inputs).sin().sum(), inputs)
    for needed, wanted in enumerate(expected):
        alone = [tensor.detach().requires_grad_(i == needed) for i, tensor in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(case.compute(*alone).sin().sum(), [alone[needed]])
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@cases
def test_autocast_agrees_with_float32(case: Case):
    inputs = case.tensors(torch.float32)
    expected = torch.autograd.grad(case.compute(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.compute(*inputs)
    assert output.dtype == torch.bfloat16
    for got, wanted in zip(torch.autograd.grad(output.float().square().sum(), inputs), expected, strict=True):
        # bfloat16 has 8 bits; sums of some dozen products keep about 5 of them
        assert (got - wanted).norm() < 0.03 * wanted.norm()


@in_both_formats(CASES)
def test_a_graph_of_the_gradients_has_the_same_gradients(case: Case, last: bool):
    inputs = case.tensors(channels_last=last)
    found = [
        torch.autograd.grad(case.compute(*inputs).sin().sum(), inputs, create_graph=graph) for graph in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@in_both_formats(WITHOUT_DROPOUT)
def test_it_is_the_law(case: Case, last: bool):
    inputs = case.tensors(channels_last=last)
    torch.testing.assert_close(case.compute(*inputs), case.law(*inputs), rtol=1e-12, atol=1e-12)


@in_both_formats(WITHOUT_DROPOUT)
def test_ordinary_operations_are_the_law(case: Case, last: bool):
    found = []
    for compute in (case.compute, case.law):
        inputs = case.tensors(channels_last=last)
        with disabled_kernels("all"):
            output = compute(*inputs)
        found.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@in_both_formats([case for case in CASES if case.dropout])
def test_ordinary_operations_drop_elements_of_the_branch_only(case: Case, last: bool):
    x, weight, bias, A, B = inputs = case.tensors(channels_last=last)
    with disabled_kernels("all"):
        output = case.compute(*inputs)
    torch.manual_seed(7)
    update = case.law(F.dropout(x, case.dropout), torch.zeros_like(weight), torch.zeros_like(bias), A, B)
    torch.testing.assert_close(output, case.geometry.convolve(x, weight, bias) + update, rtol=1e-11, atol=1e-11)
