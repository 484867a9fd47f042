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
        new_modules: Names, relative to `module`, of the modules whose parameters are newly initialized.
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
    names = [name for name, child in module.named_children() if name != base]
    return tuple(own for name in names for own in _unmistakable(module, name))


def _unmistakable(module: nn.Module, name: str) -> list[str]:
    """A module with parameters by a name that no other's ends in (DPT has `head` and `head.head`): it, or its parts."""
    part = module.get_submodule(name)
    if not any(True for _ in part.parameters()):
        return []
    parts = [f"{name}.{child}" for child, _ in part.named_children()]
    if parts and any(other.endswith(f".{name}") for other, _ in module.named_modules()):
        return [own for inner in parts for own in _unmistakable(module, inner)]
    return [name]


def is_inside(key: str, modules: Sequence[str]) -> bool:
    """Whether a state-dict key belongs to one of these modules."""
    return any(key.startswith(f"{name}.") for name in modules)
