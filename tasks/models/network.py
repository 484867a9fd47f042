"""The result of building a network, the same for every source."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Network:
    """A network that is ready to train.

    Attributes:
        module: The network, in training mode.
        new_modules: Names, relative to `module`, of the modules whose parameters are newly initialized.
        mean: Mean of each channel that the network expects of images in [0, 1]; None if its source does not say.
        std: Standard deviation of each channel, likewise.
        size: Height and width of the images that the network was made for; None if any will do.
        interpolation: How its images were resized: `bilinear`, `bicubic` or `nearest`.
        bgr: Whether it expects the channels in the order blue, green, red.
    """

    module: nn.Module
    new_modules: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    bgr: bool = False


def children_except(module: nn.Module, base: str) -> tuple[str, ...]:
    """Names of the children with parameters, without `base`: the parts that may be a new head."""
    names = [name for name, _ in module.named_children() if name != base]
    return tuple(part for name in names for part in _unambiguous(module, name))


def _unambiguous(module: nn.Module, name: str) -> list[str]:
    """A module with parameters, or its parts if another module's name ends in its name (DPT: `head`, `head.head`)."""
    child = module.get_submodule(name)
    if not any(True for _ in child.parameters()):
        return []
    parts = [f"{name}.{part}" for part, _ in child.named_children()]
    if parts and any(other.endswith(f".{name}") for other, _ in module.named_modules()):
        return [inner for part in parts for inner in _unambiguous(module, part)]
    return [name]


def is_inside(key: str, modules: Sequence[str]) -> bool:
    """Whether a state-dict key belongs to one of these modules."""
    return any(key.startswith(f"{name}.") for name in modules)
