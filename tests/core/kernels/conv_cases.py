"""Convolutions with an update that take each path, and the law."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora_plugins.kernels import Geometry, lora_conv
from tests.core.kernels.update import LowRank


def conv(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, *update: Tensor | float) -> Tensor:
    """Calls `lora_conv` with an update of A, B, scaling, dropout and, if given, low_memory."""
    return lora_conv(x, weight, bias, LowRank(*update), geometry)


@dataclass(frozen=True)
class Case:
    """A convolution, and the path that is taken."""

    id: str
    effective_weight_first: bool
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
        return conv(self.geometry, *inputs, 1.7, self.dropout)

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

WITHOUT_DROPOUT = [case for case in CASES if not case.dropout]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
ONE_OF_EACH_PATH = [
    next(case for case in CASES if case.effective_weight_first == first and case.small_products == small)
    for first in (False, True)
    for small in (False, True)
]


def in_both_formats(cases: list[Case], fast: list[Case] = CASES) -> pytest.MarkDecorator:
    """Parametrises a test by cases and the order of the input in memory; all but `fast` are slow tests."""
    return pytest.mark.parametrize(
        ("case", "last"),
        [
            pytest.param(
                case,
                last,
                id=f"{case.id}-{'channels_last' if last else 'contiguous'}",
                marks=[] if case in fast else pytest.mark.slow,
            )
            for case in cases
            for last in (False, True)
            if not last or len(case.size) == 2
        ],
    )
