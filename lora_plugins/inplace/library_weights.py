"""Layers with weights that other libraries quantized: read as dense values, never written.

What a weight of theirs cannot do is said by `foreign_problem`, while planning.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins.inplace.layer_state import base_class_of
from lora_plugins.inplace.library_kinds import Foreign, foreign_kind
from lora_plugins.utils import ending

_PINNED = "_lora_held_"
"""What the name begins with under which a layer keeps its own value of a pinned attribute."""

_QUANTO = "optimum.quanto"


def foreign_weights(layer: nn.Module) -> dict[str, Foreign]:
    """Returns the kinds of a layer's quantized weights by attribute name; empty for most layers."""
    found = {name: foreign_kind(value) for name, value in layer._parameters.items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def foreign_problem(layer: nn.Module, name: str) -> str:
    """Says why updates cannot be added to a weight that another library quantized; empty if they can."""
    if base_class_of(layer).__module__.startswith(_QUANTO):
        return (
            "is one of quanto, whose layers quantize what they read in each forward, the update included; use "
            "LoraConfig.quantize, bitsandbytes or torchao, or exclude the layer"
        )
    value = layer._parameters.get(name)
    kind = foreign_kind(value)
    return "" if kind is None else kind.problem(layer, value)


def pin_attributes(layer: nn.Module) -> None:
    """Gives a layer those values of attributes with which its library leaves the weights readable."""
    for kind in foreign_weights(layer).values():
        for name, value in kind.pinned:
            if name in layer.__dict__ and _PINNED + name not in layer.__dict__:
                layer.__dict__[_PINNED + name] = layer.__dict__[name]
                layer.__dict__[name] = value


def unpin_attributes(layer: nn.Module) -> None:
    """Undoes `pin_attributes`."""
    for key in [key for key in layer.__dict__ if key.startswith(_PINNED)]:
        layer.__dict__[key.removeprefix(_PINNED)] = layer.__dict__.pop(key)


@contextmanager
def readable(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Pins the attributes of layers for the duration of the block, where they are not pinned already."""
    loose = [layer for layer in layers if not any(key.startswith(_PINNED) for key in layer.__dict__)]

    def undo() -> None:
        for layer in loose:
            unpin_attributes(layer)

    with ending(undo):
        for layer in loose:
            pin_attributes(layer)
        yield


@contextmanager
def as_its_own(layer: nn.Module, base: Any) -> Iterator[None]:
    """Gives a layer a class that reads what it stores, as the one of its library, for the duration of the block."""
    with ending(partial(setattr, layer, "__class__", type(layer))):
        layer.__class__ = base
        yield


def put_dense_foreign(layer: nn.Module, name: str, value: Tensor | None = None) -> None:
    """Replaces a weight that another library quantized by a parameter, with the dense value that it has by default.

    The layer has no adapters, or is about to lose them.
    """
    weight: Any = layer._parameters[name]
    kind = foreign_kind(weight)
    assert kind is not None
    with torch.no_grad():
        dense = kind.dense(layer, weight) if value is None else value
    layer._parameters[name] = nn.Parameter(dense, requires_grad=False)
    if kind.dense_class is not None:
        layer.__class__ = kind.dense_class


@dataclass(frozen=True)
class LibraryWeight:
    """A weight that another library quantized, and what its layer was with it.

    Args:
        weight: The weight.
        layer_class: The class of the layer, without adapters.
        dense: Makes the dense value.
    """

    weight: nn.Parameter
    layer_class: type[nn.Module]
    dense: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense value."""
        return self.dense().shape

    def put(self, layer: nn.Module, name: str) -> None:
        """Puts it back into a layer without adapters, in place of a dense one and on its device."""
        dense = layer._parameters[name]
        assert dense is not None
        moved = self.weight if self.weight.device == dense.device else self.weight.to(dense.device)
        layer._parameters[name] = cast(nn.Parameter, moved)
        layer.__class__ = self.layer_class


def library_weights(layer: nn.Module) -> dict[str, LibraryWeight]:
    """Returns a layer's weights that other libraries quantized, to be put back later; empty for most layers."""

    def kept(name: str, kind: Foreign) -> LibraryWeight:
        weight: Any = layer._parameters[name]
        return LibraryWeight(weight, base_class_of(layer), torch.no_grad()(partial(kind.dense, layer, weight)))

    return {name: kept(name, kind) for name, kind in foreign_weights(layer).items()}
