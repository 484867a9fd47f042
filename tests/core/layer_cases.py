"""Layers with every option that changes what they compute, each with an input and its update written out by hand."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.core.libraries import Conv1D, Conv2dSame, DeformConv2d, ScaledStdConv2d, StdConv2dSame


@dataclass(frozen=True)
class LayerCase:
    """A layer, an input for it, and how `B @ A` lies in its weight."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    layout: Callable[[Tensor, torch.Size], Tensor]
    weight: str = "weight"
    dropout: bool = True


def rows(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.reshape(shape)


def columns(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.T.reshape(shape)


class DoubledInput(nn.Linear):
    """A subclass that transforms its input, and whose constructor takes other arguments."""

    def __init__(self) -> None:
        super().__init__(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class SquaredWeight(nn.Conv2d):
    """A subclass that transforms its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.square(), self.bias)


def _values(*shape: int, with_others: Sequence[tuple[int, ...]] = ()) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(*each, dtype=torch.float64) for each in (shape, *with_others))


def _indices() -> tuple[Tensor, ...]:
    return (torch.tensor([[0, 3, 3, 1], [6, 0, 2, 3]]),)


def _convolutions() -> list[LayerCase]:
    cases = []
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    grid = itertools.product(kinds, (1, 2, 4), (1, 2), (1, 2), ("zeros", "reflect", "circular", "replicate"))
    for dimensions, groups, stride, dilation, mode in grid:
        if dimensions == 3 and mode != "zeros" and (stride, dilation) != (1, 1):
            continue  # the padding of three dimensions is covered once per mode
        cases.append(
            LayerCase(
                f"conv{dimensions}d-groups{groups}-stride{stride}-dilation{dilation}-{mode}",
                lambda kind=kinds[dimensions], g=groups, s=stride, d=dilation, m=mode: kind(
                    4, 8, 3, stride=s, padding=2, dilation=d, groups=g, padding_mode=m
                ),
                _values(2, 4, *[7] * dimensions),
                rows,
            )
        )
    transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    for dimensions, groups, stride, dilation in itertools.product(transposed, (1, 2, 4), (1, 2), (1, 2)):
        cases.append(
            LayerCase(
                f"conv_transpose{dimensions}d-groups{groups}-stride{stride}-dilation{dilation}",
                lambda kind=transposed[dimensions], g=groups, s=stride, d=dilation: kind(
                    4, 8, 3, stride=s, padding=1, output_padding=s - 1, dilation=d, groups=g
                ),
                _values(2, 4, *[5] * dimensions),
                columns,
            )
        )
    return cases


LAYER_CASES = [
    LayerCase("linear", lambda: nn.Linear(6, 5), _values(2, 3, 6), rows),
    LayerCase("linear-no_bias", lambda: nn.Linear(6, 5, bias=False), _values(4, 6), rows),
    LayerCase("linear-doubled_input", DoubledInput, _values(4, 6), rows, dropout=False),
    LayerCase("transformers_conv1d", lambda: Conv1D(5, 6), _values(2, 3, 6), columns),
    *_convolutions(),
    LayerCase("conv1d-unpadded", lambda: nn.Conv1d(4, 8, 3), _values(2, 4, 7), rows),
    LayerCase("conv2d-unpadded-column", lambda: nn.Conv2d(4, 8, (3, 1)), _values(2, 4, 6, 7), rows),
    LayerCase("conv2d-pointwise-stride", lambda: nn.Conv2d(4, 8, 1, stride=(2, 1)), _values(2, 4, 6, 7), rows),
    LayerCase("conv2d-same_padding", lambda: nn.Conv2d(3, 4, (5, 3), padding="same"), _values(2, 3, 6, 6), rows),
    LayerCase("conv2d-same-timm", lambda: Conv2dSame(3, 4, 3, stride=2), _values(2, 3, 7, 8), rows),
    LayerCase(
        "conv2d-same-timm-depthwise",
        lambda: Conv2dSame(4, 8, (5, 2), stride=(3, 2), dilation=(1, 2), groups=4, bias=False),
        _values(2, 4, 8, 7),
        rows,
    ),
    LayerCase("conv2d-std-timm", lambda: StdConv2dSame(3, 4, 3), _values(2, 3, 7, 7), rows, dropout=False),
    LayerCase("conv2d-scaled-std-timm", lambda: ScaledStdConv2d(3, 4, 3), _values(2, 3, 7, 7), rows, dropout=False),
    LayerCase("conv2d-squared_weight", lambda: SquaredWeight(3, 4, 3), _values(2, 3, 7, 7), rows, dropout=False),
    LayerCase("deform_conv2d", lambda: DeformConv2d(4, 8, 3), _values(2, 4, 6, 7, with_others=[(2, 18, 4, 5)]), rows),
    LayerCase(
        "deform_conv2d-groups-mask",
        lambda: DeformConv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False),
        _values(2, 4, 6, 7, with_others=[(2, 36, 3, 4), (2, 18, 3, 4)]),
        rows,
    ),
    LayerCase("embedding", lambda: nn.Embedding(7, 5), _indices, columns, dropout=False),
    LayerCase("embedding-padding", lambda: nn.Embedding(7, 5, padding_idx=3), _indices, columns, dropout=False),
    LayerCase("embedding-max_norm", lambda: nn.Embedding(7, 5, max_norm=0.5), _indices, columns, dropout=False),
    LayerCase(
        "embedding-scale_grad",
        lambda: nn.Embedding(7, 5, padding_idx=0, scale_grad_by_freq=True),
        _indices,
        columns,
        dropout=False,
    ),
]
