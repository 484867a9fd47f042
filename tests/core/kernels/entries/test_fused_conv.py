"""The function of a convolution: each path, in parts, in the format of its input, with little saved."""

import pytest
import torch
from torch.nn import functional as F

from lora_plugins.kernels import Geometry
from lora_plugins.kernels import dropout as masks
from lora_plugins.kernels.conv_geometry import pointwise
from tests.core.kernels.conv_cases import CASES, Case, cases, conv, in_both_formats
from tests.core.kernels.needs import needs

fused_conv = pytest.importorskip("lora_plugins.kernels.entries.fused_conv")
pytestmark = needs("fused_conv")

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

WITH_SOMETHING_SMALL = {
    "kernel-depthwise-tiny",
    "both-tiny",
    "kernel-depthwise-large-dilated",
    "products-pointwise",
    "products-dropout-tiny",
    "update-dropout-tiny",
}


@cases
def test_a_case_takes_the_path_it_says(case: Case):
    x, weight, _, A, _ = case.tensors()
    path = fused_conv.choose_path(x, weight, A, case.dropout, case.geometry)
    assert path == (case.effective_weight_first, case.small_products)


@in_both_formats(CASES)
def test_images_may_be_dropped_one_by_one(case: Case, last: bool, monkeypatch):
    inputs = case.tensors(channels_last=last)
    found = []
    for at_once in (1, 2**20):
        monkeypatch.setattr(masks, "_CHUNK_ELEMENTS", at_once)
        output = case.compute(*inputs)
        found.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@cases
def test_only_the_input_is_kept_and_what_is_an_eighth_of_it(case: Case):
    inputs = case.tensors(torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.compute(*inputs)
    others = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    extra = [size for address, size in others.items() if address not in known]
    assert sum(extra) <= inputs[0].numel() / 8
    assert len(extra) == (case.id in WITH_SOMETHING_SMALL)


@needs("recompute")
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_nothing_small_is_kept_where_the_input_is_computed_again(dropout: float):
    x = F.silu(torch.randn(2, 16, 31, 30, requires_grad=True))
    weight, A, B = torch.randn(12, 16, 3, 3), torch.randn(1, 144, requires_grad=True), torch.randn(12, 1)
    counts = []
    for low in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            conv(Geometry((1, 1), (1, 1), (1, 1), 1), x, weight, None, A, B, 1.0, dropout, low)
        counts.append(len({tensor.untyped_storage().data_ptr() for tensor in kept}))
    assert counts == [5, 3]  # input, weight, A, B and something small; weight, A, B


@in_both_formats(CASES)
def test_it_is_the_law_in_the_format_of_its_input(case: Case, last: bool):
    inputs = case.tensors(channels_last=last)
    output = case.compute(*inputs)
    if not case.dropout:
        torch.testing.assert_close(output, case.law(*inputs), rtol=1e-12, atol=1e-12)
    if last:
        assert output.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(output.sum(), inputs[:1])
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@needs("fused_linear")
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dimensions", [1, 2, 3], ids=["1d", "2d", "3d"])
def test_a_pointwise_convolution_has_the_format_of_torch(dimensions: int, last: bool, dropout: float):
    x = torch.randn(2, *[5] * dimensions, 16).movedim(-1, 1)
    x = (x if last else x.contiguous()).requires_grad_()
    weight, A, B = torch.randn(24, 16, *[1] * dimensions), torch.randn(1, 16), torch.randn(24, 1)
    expected = CONVOLUTIONS[dimensions](x, weight)
    output = conv(pointwise(dimensions), x, weight, None, A, B, 1.0, dropout)
    assert output.stride() == expected.stride()
    assert (output.grad_fn.name() == "_LoraLinearBackward") == (last and dimensions == 2)


@pytest.mark.parametrize("step", [16, 64], ids=["of_a_position", "of_the_image"])
def test_a_single_image_has_the_format_of_torch_behind_views(step: int):
    x = torch.randn(64).as_strided((1, 16, 2, 2), (step, 1, 32, 16)).requires_grad_()
    weight, A, B = torch.randn(24, 16, 1, 1), torch.randn(1, 16), torch.randn(24, 1)
    outputs = F.conv2d(x, weight), conv(pointwise(2), x, weight, None, A, B, 1.0, 0.0)
    strides = [(y.stride(), torch.autograd.grad(y.sum(), x)[0].stride()) for y in outputs]
    assert strides[0] == strides[1]
