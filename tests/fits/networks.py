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


NETWORKS: Mapping[str, type[Network]] = {kind.__name__: kind for kind in (Mlp, Twice, Conv, Tied)}
"""The networks by name."""


def build(name: str, seed: int, dtype: torch.dtype) -> Network:
    """Makes a network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]().to(dtype)


def heads(name: str, which: str) -> tuple[str, ...]:
    """The names of what is trained in full, as `Fit.heads` says."""
    return {"none": (), "head": ("head",), "two": ("head", NETWORKS[name].layers[-1])}[which]


def adapted(name: str, which: str) -> tuple[str, ...]:
    """The names of what is adapted: the layers that are no heads."""
    return tuple(layer for layer in NETWORKS[name].layers if layer not in heads(name, which))
