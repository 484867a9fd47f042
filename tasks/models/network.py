"""The outcome of building a network, the same for every source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Network:
    """A network that is ready to train.

    Attributes:
        module: The network, in training mode.
        new_modules: Names, relative to `module`, of the modules whose parameters are newly initialised.
        mean: Mean of each channel that the network expects of images in [0, 1], or None where its source says none.
        std: Standard deviation of each channel, likewise.
        size: Height and width of the images that the network was made for, or None where any will do.
        interpolation: How its images were brought to that size: `bilinear`, `bicubic` or `nearest`.
        bgr: Whether it wants blue, green and red in this order.
    """

    module: nn.Module
    new_modules: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    bgr: bool = False


def children_besides(module: nn.Module, base: str) -> tuple[str, ...]:
    """Names of the children with parameters of their own, leaving out `base`: the parts that may be a new head."""
    return tuple(
        name for name, child in module.named_children() if name != base and any(True for _ in child.parameters())
    )


def is_inside(key: str, modules: Sequence[str]) -> bool:
    """Whether a state-dict key belongs to one of these modules."""
    return any(key.startswith(f"{name}.") for name in modules)
