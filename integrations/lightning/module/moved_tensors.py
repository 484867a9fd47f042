"""Tensors of the base that a module changes by hand, as a teacher's average: checkpoints hold them, unlike the rest.

An adapter belongs to the values that they had before, whose fingerprints it keeps.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import nn

from lora_plugins import LoraModel
from lora_plugins.adapter import present_state
from lora_plugins.inplace import full_name
from lora_plugins.integrations.lightning.module.adapted_parts import (
    adapted_targets,
    adapted_weights,
    adapters_by_place,
)

Fingerprints = Mapping[str, Mapping[str, float]]
"""Of tensors, by full name."""

KnownBases = Mapping[tuple[str, str], Mapping[str, tuple[float, float]]]
"""Of tensors, by path and name of an adapter, and by name below that path."""

_MOVED = "_lora_moved"
"""Attribute of a LightningModule with the names of what it moved by hand; only modules that did have it."""


def moved_by_hand(module: nn.Module) -> frozenset[str]:
    """Returns the names of tensors that no adapter changes and the module itself has changed: see `mark_moved`."""
    found: frozenset[str] = module.__dict__.get(_MOVED, frozenset())
    return found


def adapted_layers_moved(module: nn.Module) -> list[str]:
    """Returns the adapted weights, by name, that the module has changed by hand."""
    return sorted(moved_by_hand(module).intersection(adapted_weights(module)))


def mark_moved(module: nn.Module, names: Iterable[str], before: Fingerprints = MappingProxyType({})) -> None:
    """Records on the module that it changes tensors by hand, as those of a teacher: checkpoints hold them from now on.

    `before` is what `known_fingerprints` returned before; by default, what is known now counts.
    """
    moved = moved_by_hand(module) | frozenset(names)
    if moved:
        module.__dict__[_MOVED] = moved
    for (path, _), adapter in adapters_by_place(module).items():
        for name, (_, values) in adapter.fingerprints.items():
            full = full_name(path, name)
            if full in moved or any(_computes(source, full) for source in moved):
                adapter.kept.setdefault(name, dict(before.get(full, values)))


def known_fingerprints(module: nn.Module) -> Fingerprints:
    """Returns the fingerprints of what adapters are trained on, by full name, as far as they were taken.

    Adapters forget them when a base is loaded.
    """
    return {
        full_name(path, name): values
        for (path, _), adapter in adapters_by_place(module).items()
        for name, (_, values) in adapter.fingerprints.items()
    }


def take_fingerprints(module: nn.Module) -> None:
    """Takes the fingerprints of what adapters are trained on, where none have been taken since the base was loaded.

    They have to be taken before the module moves any of it by hand: the module will be built again with the values
    that it had before.
    """
    for target in adapted_targets(module).values():
        for name, adapter in present_state(target).adapters.items():
            if not adapter.fingerprints:
                LoraModel(target).pack(name)


def known_bases(module: nn.Module) -> KnownBases:
    """Returns what adapters know of the base that they were added to, by path and name.

    Loading a whole state dict makes them forget it. That of a checkpoint has the same base, and what has moved since.
    """
    return {place: dict(adapter.base) for place, adapter in adapters_by_place(module).items()}


def put_back_known_bases(module: nn.Module, known: KnownBases) -> None:
    """Lets adapters know again what `known_bases` returned."""
    for place, adapter in adapters_by_place(module).items():
        adapter.base.update(known.get(place, {}))


def _computes(source: str, weight: str) -> bool:
    """Whether a tensor has the name of one that weight norm or a parametrization computes a weight from."""
    layer, _, own = weight.rpartition(".")
    return source.startswith((f"{weight}_", f"{layer}.parametrizations.{own}."))
