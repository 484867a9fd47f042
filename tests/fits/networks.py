"""Small networks from six numbers to three classes, one for each way in which a layer is used."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

FEATURES, CLASSES = 6, 3


class Network(nn.Module):
    """A network with a `head`; `layers` are the names of those that are adapted."""

    layers: ClassVar[tuple[str, ...]] = ("a", "b")
    columns: ClassVar[tuple[str, ...]] = ()
    """Those of `layers` whose weight has its inputs first."""


class Mlp(Network):
    """Running statistics and dropout between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.dropout = nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.Dropout(0.2)
        self.b, self.head = nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.dropout(torch.relu(self.bn(self.a(x)))))))


class Twice(Network):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.norm(torch.tanh(self.b(torch.relu(self.a(x))))))))


class Conv(Network):
    """Convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.head = nn.Conv2d(4, 8, 3, groups=2, stride=2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 1, 2, 3).repeat(1, 1, 3, 2)
        return self.head(torch.relu(self.b(torch.relu(self.bn(self.a(x))))).mean((2, 3)))


class Tied(Network):
    """A layer under two names, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Linear(FEATURES, 8), nn.Linear(8, 8)
        self.b, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, CLASSES)
        self.c = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(self.stem(x))))))))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.proj(self.norm(x)))


class Nested(Network):
    """Layers deep inside."""

    layers = ("body.0.proj", "body.1.proj")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(FEATURES, 8), nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Table(Network):
    """A layer that rows are looked up in."""

    columns = ("a",)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (2 + x).clamp(0, 4).long()
        return self.head(torch.tanh(self.b(self.a(tokens).mean(1))))


class Upsampler(Network):
    """A transposed convolution."""

    columns = ("a",)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ConvTranspose1d(2, 4, 3, stride=2), nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x.reshape(-1, 2, 3))))).mean(2))


KINDS = (Mlp, Twice, Conv, Tied, Nested, Table, Upsampler)
NETWORKS: Mapping[str, type[Network]] = {kind.__name__: kind for kind in KINDS}
"""The networks by name."""


def build(name: str, seed: int, dtype: torch.dtype) -> Network:
    """Makes a network with random weights: the same ones inside of Lightning's context for a precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NETWORKS[name]()
    finally:
        torch.set_default_dtype(before)


def heads(name: str, which: str) -> tuple[str, ...]:
    """The names of what is trained in full, as `Fit.heads` says."""
    return {"none": (), "head": ("head",), "two": ("head", NETWORKS[name].layers[-1])}[which]


def adapted(name: str, which: str) -> tuple[str, ...]:
    """The names of what is adapted: the layers that are no heads."""
    return tuple(layer for layer in NETWORKS[name].layers if layer not in heads(name, which))
