"""The function of a rescaled layer: nothing saved but its input, and dropped in parts."""

import math

import pytest
import torch

from lora_plugins.kernels import dropout as masks
from tests.core.kernels.needs import needs
from tests.core.kernels.test_rescaled import call, drops, geometries, tensors

pytest.importorskip("lora_plugins.kernels.entries.fused_rescaled")
pytestmark = needs("fused_rescaled")


@geometries
@drops
def test_only_the_input_is_kept(geometry, inputs, weight, dropout):
    given = tensors(inputs, weight, torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(geometry, dropout)(*given)
    of_rows = weight[0]  # what the rows are multiplied by
    assert all(t.numel() <= of_rows for t in kept if t.untyped_storage().data_ptr() not in known)


@geometries
@pytest.mark.parametrize("low_memory", [False, True], ids=["normal", "low"])
def test_autocast_keeps_as_much_as_a_plain_layer(geometry, inputs, weight, low_memory):
    given = tensors(inputs, weight, torch.float32)
    x = given[0].detach().bfloat16().requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *given)}
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        call(geometry, low_memory=low_memory)(x, *given[1:])
    large = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in known and t.numel() > weight[0]]
    assert large == ([] if low_memory else [math.prod(weight)])


@geometries
def test_images_may_be_dropped_in_parts(geometry, inputs, weight, monkeypatch):
    given, found = tensors(inputs, weight), []
    for elements in (1, 2**20):
        monkeypatch.setattr(masks, "_CHUNK_ELEMENTS", elements)
        output = call(geometry, 0.3)(*given)
        found.append([output, *torch.autograd.grad(output.sin().sum(), given)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_backward_may_run_twice():
    given = tensors((3, 4, 6), (5, 6))
    output = call(None)(*given).sin().sum()
    first = torch.autograd.grad(output, given, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, given), first, rtol=0, atol=0)


@pytest.mark.parametrize("changed", [1, 3, 4, 5], ids=["weight", "A", "B", "magnitude"])
def test_a_value_that_changed_since_the_forward_is_an_error(changed):
    given = tensors((3, 4, 6), (5, 6))
    output = call(None)(*given).sin().sum()
    with torch.no_grad():
        given[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
