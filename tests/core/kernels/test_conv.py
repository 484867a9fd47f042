"""The convolution computes the law, whichever way it chooses, with exact gradients of every order."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import conv_geometry as geometry
from lora_plugins.kernels import dropout as masks
from lora_plugins.kernels.conv import lora_conv, ways
from lora_plugins.kernels.conv_geometry import Geometry, pointwise

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Case:
    """A convolution, and whether its update goes first and its factors get their gradients from small products."""

    id: str
    update_first: bool
    small_products: bool
    outputs: int = 6
    inputs: int = 4
    size: tuple[int, ...] = (6, 5)
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    r: int = 2
    dropout: float = 0.0

    @property
    def geometry(self) -> Geometry:
        n = len(self.size)
        return Geometry((self.stride,) * n, (self.padding,) * n, (self.dilation,) * n, self.groups)

    def tensors(self, dtype: torch.dtype = torch.float64, *, channels_last: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        n = len(self.size)
        columns = self.inputs // self.groups * self.kernel**n
        shapes = [
            (2, self.inputs, *self.size),
            (self.outputs, self.inputs // self.groups, *(self.kernel,) * n),
            (self.outputs,),
            (self.r, columns),
            (self.outputs, self.r),
        ]
        tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
        if channels_last:
            tensors[:2] = [t.contiguous(memory_format=torch.channels_last) for t in tensors[:2]]
        return [tensor.requires_grad_() for tensor in tensors]

    def compute(self, *inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return lora_conv(*inputs, 1.7, self.dropout, self.geometry)

    def law(self, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.geometry.convolve(x, weight + 1.7 * (B @ A).view(weight.shape), bias)


CASES = [
    Case("kernel", True, False),
    Case("kernel-strided-dilated", True, False, stride=2, padding=2, dilation=2),
    Case("kernel-grouped", True, False, groups=2),
    Case("kernel-depthwise", True, False, groups=4, outputs=4),
    Case("kernel-depthwise-tiny", True, False, groups=4, outputs=4, size=(31, 30)),
    Case("kernel-depthwise-large", True, False, groups=4, outputs=4, kernel=5, padding=2),
    Case("kernel-depthwise-large-strided", True, False, groups=4, outputs=4, kernel=5, padding=2, stride=2),
    Case("kernel-depthwise-large-dilated", True, False, groups=4, outputs=4, size=(11, 9), kernel=4, dilation=2),
    Case("update-dropout-depthwise-large", False, False, groups=4, outputs=4, kernel=5, padding=2, dropout=0.3),
    Case("kernel-1d", True, False, size=(9,)),
    Case("kernel-3d", True, False, size=(3, 4, 3)),
    Case("both", True, True, outputs=12, r=1),
    Case("both-tiny", True, True, outputs=12, r=1, size=(62, 61)),
    Case("both-strided", True, True, outputs=12, r=1, stride=2),
    Case("both-pointwise", True, True, outputs=12, inputs=16, r=1, kernel=1, padding=0),
    Case("both-pointwise-strided", True, True, outputs=12, inputs=16, r=1, kernel=1, padding=0, stride=2),
    Case("products", False, True, outputs=12, r=1, size=(2, 2)),
    Case("products-pointwise", False, True, outputs=12, inputs=16, r=1, kernel=1, padding=0, size=(1, 2)),
    Case("products-dropout", False, True, dropout=0.3),
    Case("products-dropout-tiny", False, True, size=(21, 20), inputs=16, r=1, dropout=0.3),
    Case("products-dropout-pointwise", False, True, kernel=1, padding=0, dropout=0.3),
    Case("products-dropout-pointwise-strided", False, True, kernel=1, padding=0, stride=2, dropout=0.3),
    Case("update-dropout-grouped", False, False, groups=2, dropout=0.3),
    Case("update-dropout-tiny", False, False, groups=2, size=(31, 30), dropout=0.3),
]

WITH_SOMETHING_SMALL = {
    "kernel-depthwise-tiny",
    "both-tiny",
    "kernel-depthwise-large-dilated",
    "products-pointwise",
    "products-dropout-tiny",
    "update-dropout-tiny",
}

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
formats = pytest.mark.parametrize(
    ("case", "last"),
    [(case, last) for case in CASES for last in (False, True) if not last or len(case.size) == 2],
    ids=lambda value: value.id if isinstance(value, Case) else ("channels_last" if value else "contiguous"),
)


@cases
def test_a_case_goes_the_way_it_says(case: Case):
    x, weight, _, A, _ = case.tensors()
    assert ways(x, weight, A, case.dropout, case.geometry) == (case.update_first, case.small_products)


@formats
def test_images_may_be_dropped_one_by_one(case: Case, last: bool, monkeypatch):
    inputs = case.tensors(channels_last=last)
    found = []
    for at_once in (1, 2**20):
        monkeypatch.setattr(masks, "_AT_ONCE", at_once)
        output = case.compute(*inputs)
        found.append([output, *torch.autograd.grad(output.sin().sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@formats
def test_gradients(case: Case, last: bool):
    assert torch.autograd.gradcheck(case.compute, case.tensors(channels_last=last), fast_mode=True)


@cases
def test_gradients_of_second_order(case: Case):
    assert torch.autograd.gradgradcheck(case.compute, case.tensors(), fast_mode=True)


@formats
def test_it_is_the_law_in_the_format_of_its_input(case: Case, last: bool):
    inputs = case.tensors(channels_last=last)
    output = case.compute(*inputs)
    if not case.dropout:
        torch.testing.assert_close(output, case.law(*inputs), rtol=1e-12, atol=1e-12)
    if last:
        assert output.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(output.sum(), inputs[:1])
        assert gradient.is_contiguous(memory_format=torch.channels_last)


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


@formats
def test_a_graph_of_the_gradients_has_the_same_gradients(case: Case, last: bool):
    inputs = case.tensors(channels_last=last)
    found = [
        torch.autograd.grad(case.compute(*inputs).sin().sum(), inputs, create_graph=graph) for graph in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dimensions", [1, 2, 3], ids=["1d", "2d", "3d"])
def test_a_pointwise_convolution_has_the_format_of_torch(dimensions: int, last: bool, dropout: float):
    x = torch.randn(2, *[5] * dimensions, 16).movedim(-1, 1)
    x = (x if last else x.contiguous()).requires_grad_()
    weight, A, B = torch.randn(24, 16, *[1] * dimensions), torch.randn(1, 16), torch.randn(24, 1)
    expected = CONVOLUTIONS[dimensions](x, weight)
    output = lora_conv(x, weight, None, A, B, 1.0, dropout, pointwise(dimensions))
    assert output.stride() == expected.stride()
    assert (output.grad_fn.name() == "_LoraLinearBackward") == (last and dimensions == 2)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_nothing_small_is_kept_where_the_input_is_computed_again(dropout: float):
    x = F.silu(torch.randn(2, 16, 31, 30, requires_grad=True))
    weight, A, B = torch.randn(12, 16, 3, 3), torch.randn(1, 144, requires_grad=True), torch.randn(12, 1)
    counts = []
    for low in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            lora_conv(x, weight, None, A, B, 1.0, dropout, Geometry((1, 1), (1, 1), (1, 1), 1), low_memory=low)
        counts.append(len({tensor.untyped_storage().data_ptr() for tensor in kept}))
    assert counts == [5, 3]  # input, weight, A, B and something small; weight, A, B


@pytest.mark.parametrize("at_once", [1, 2**18], ids=["image_by_image", "whole_batch"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [(9, 8), (10, 11), (5, 4)], ids=str)  # the last stride reaches the end, or does not
def test_the_gradient_of_a_large_depthwise_kernel(at_once, last, stride, size, monkeypatch):
    monkeypatch.setattr(geometry, "_AT_ONCE", at_once)
    x, kernel = torch.randn(3, 4, *size, dtype=torch.float64), torch.randn(4, 1, 5, 4, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    moves = {"stride": stride, "padding": (1, 2), "dilation": (1, 2)}
    y = torch.nn.functional.conv2d(x, kernel.requires_grad_(), groups=4, **moves)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, kernel, dy)
    move = Geometry(**moves, groups=4)
    torch.testing.assert_close(move.gradients(dy, x, kernel, of_x=False, of_kernel=True)[1], expected)
    assert move.is_large_depthwise(x, kernel)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "moves"),
    [((5, 5), 1, 0, False), ((2, 2), 2, 2, False), ((1, 1), 1, 2, False), ((6, 5), 1, 0, True), ((3, 3), 2, 2, True)],
    ids=["fills_the_image", "stride", "one_position", "two_positions", "stride_and_padding"],
)
def test_a_large_depthwise_kernel_that_goes_nowhere_is_left_to_the_library(size, stride, padding, moves):
    move = Geometry((stride,) * 2, (padding,) * 2, (1, 1), 4)
    x, kernel = torch.randn(3, 4, *size), torch.randn(4, 1, 5, 5)
    assert move.is_large_depthwise(x, kernel) == moves == (move.convolve(x, kernel)[0, 0].numel() > 1)
