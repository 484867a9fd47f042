"""The gradient of a large depthwise kernel is that of torch's library."""

import pytest
import torch

from lora_plugins.kernels import Geometry
from tests.core.kernels.needs import needs

depthwise = pytest.importorskip("lora_plugins.kernels.entries.depthwise")
pytestmark = needs("depthwise")


@pytest.mark.parametrize("at_once", [1, 2**18], ids=["image_by_image", "whole_batch"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [(9, 8), (10, 11), (5, 4)], ids=str)  # the last stride reaches the end, or does not
def test_the_gradient_of_a_large_depthwise_kernel(at_once, last, stride, size, monkeypatch):
    monkeypatch.setattr(depthwise, "_CHUNK_ELEMENTS", at_once)
    x, kernel = torch.randn(3, 4, *size, dtype=torch.float64), torch.randn(4, 1, 5, 4, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    moves = {"stride": stride, "padding": (1, 2), "dilation": (1, 2)}
    y = torch.nn.functional.conv2d(x, kernel.requires_grad_(), groups=4, **moves)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, kernel, dy)
    move = Geometry(**moves, groups=4)
    torch.testing.assert_close(move.gradients(dy, x, kernel, of_x=False, of_kernel=True)[1], expected)
    assert move.has_fast_gradient(x, kernel)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "moves"),
    [((5, 5), 1, 0, False), ((2, 2), 2, 2, False), ((1, 1), 1, 2, False), ((6, 5), 1, 0, True), ((3, 3), 2, 2, True)],
    ids=["fills_the_image", "stride", "one_position", "two_positions", "stride_and_padding"],
)
def test_a_large_depthwise_kernel_that_goes_nowhere_is_left_to_the_library(size, stride, padding, moves):
    move = Geometry((stride,) * 2, (padding,) * 2, (1, 1), 4)
    x, kernel = torch.randn(3, 4, *size), torch.randn(4, 1, 5, 5)
    assert move.has_fast_gradient(x, kernel) == moves == (move.convolve(x, kernel)[0, 0].numel() > 1)
