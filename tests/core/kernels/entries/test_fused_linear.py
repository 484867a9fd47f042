"""The linear function: both paths, in parts, in the format of its input, with nothing saved but that."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import _products
from lora_plugins.kernels import dropout as masks
from lora_plugins.kernels._path import effective_weight_is_cheaper
from tests.core.kernels.linear_cases import MANY, SHAPES, UNUSUAL, drops, linear, seeded, shapes, tensors
from tests.core.kernels.needs import needs

fused_linear = pytest.importorskip("lora_plugins.kernels.entries.fused_linear")
pytestmark = needs("fused_linear")


def test_the_shapes_take_both_paths():
    for outputs in (5, 9):
        assert effective_weight_is_cheaper(48, 6, outputs)
        assert not effective_weight_is_cheaper(2, 6, outputs)
    high = {
        name: _products.rank_is_high(48, torch.empty(n, 6), torch.empty(r, 6)) for name, (_, n, r) in SHAPES.items()
    }
    assert [name for name in SHAPES if high[name] and "first" in name] == ["effective_weight_first_and_high_rank"]


@shapes
@pytest.mark.parametrize("at_once", [1, 60], ids=["row_by_row", "some_rows"])
@pytest.mark.parametrize("adapter", [torch.float64, torch.float32], ids=str)
def test_rows_may_be_dropped_in_parts(lead, outputs, r, at_once, adapter, monkeypatch):
    x, weight, bias, *factors = tensors(lead, outputs, r)
    inputs = [x, weight, bias, *(factor.detach().to(adapter).requires_grad_() for factor in factors)]
    found, gradient = [], torch.randn(*lead, outputs, dtype=torch.float64)
    for elements in (at_once, 2**20):
        monkeypatch.setattr(masks, "_CHUNK_ELEMENTS", elements)
        output = seeded(0.3)(*inputs)
        found.append([output, *torch.autograd.grad(output, inputs, gradient)])
    error = 64 * torch.finfo(adapter).eps  # of sums of up to 48 rows
    torch.testing.assert_close(*found, rtol=error, atol=error)


@pytest.mark.parametrize("make", [UNUSUAL["transposed"], UNUSUAL["permuted"]], ids=["transposed", "permuted"])
@drops
def test_the_gradient_of_the_input_has_the_format_of_torch(make, dropout):
    weight, *others = tensors(MANY, 5, 1, torch.float32)[1:]
    x = make().requires_grad_()
    outputs = F.linear(x, weight.detach()), linear(x, weight, *others, 1.7, dropout)
    expected, found = (torch.autograd.grad(output.sum(), x)[0].stride() for output in outputs)
    assert found == expected


@drops
def test_only_the_input_is_kept(dropout):
    inputs = tensors(MANY, 9, 1, torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(*inputs, 1.7, dropout)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= known


@pytest.mark.parametrize("low_memory", [False, True], ids=["normal", "low"])
@shapes
def test_autocast_keeps_as_much_as_a_plain_layer(lead, outputs, r, low_memory):
    x, weight, bias, A, B = (tensor.detach() for tensor in tensors(lead, outputs, r, torch.float32))
    x = x.bfloat16().requires_grad_()
    A, B = A.requires_grad_(), B.requires_grad_()

    def kept(compute: Callable[[], Tensor]) -> int:
        found = []
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t),
        ):
            compute()
        known = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias, A, B)}
        return sum(tensor.numel() for tensor in found if tensor.untyped_storage().data_ptr() not in known)

    plain = kept(lambda: F.linear(x, weight, bias))
    assert plain == weight.numel()
    ours = kept(lambda: linear(x, weight, bias, A, B, 1.7, 0.0, low_memory))
    assert ours <= plain + bias.numel() + A.numel() + B.numel()  # in the type of autocast
    if low_memory and lead == MANY:
        assert ours <= bias.numel()  # in another type, for derivatives of second order
