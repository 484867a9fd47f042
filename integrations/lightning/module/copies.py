"""Copies of adapted networks inside a module: momentum encoders, averages, teachers.

A copy that the module moves by hand pairs its parameters with those of the original, by position or by name. So it has
to be adapted as the original is: then its adapter follows that of the original, and its frozen weights stay what they
are. What is told apart here, by shapes and values alone:

- an equal copy has the values of the original, as `copy.deepcopy` makes it;
- a frozen copy was frozen by its author, and the original was not. It may have other values;
- a sharing copy has modules of the original in it, and others of its own: a second projection on one backbone. It may
  have other values.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.adapter import adapter_tensors, present_state
from lora_plugins.inplace import full_name, model_modules, own_parameters, state_of
from lora_plugins.integrations.lightning.module.adapted_parts import (
    adapted_targets,
    adapters_by_place,
    trained_in_place,
)
from lora_plugins.integrations.lightning.module.bitwise import checksum, is_constant
from lora_plugins.integrations.lightning.module.frozen_parts import Fingerprint
from lora_plugins.integrations.lightning.module.merged_base import merged_weights
from lora_plugins.integrations.lightning.module.network_copy import NetworkCopy, are_repeated
from lora_plugins.integrations.lightning.module.sharing_copies import sharing_copies
from lora_plugins.utils import path_starts, within


@dataclass(frozen=True)
class _Part:
    name: str
    layout: tuple[tuple[str, torch.Size, torch.dtype], ...]
    tensors: tuple[Tensor, ...]
    trained: tuple[bool, ...]
    needs_gradient: bool

    @cached_property
    def first_checksum(self) -> int | None:
        """The checksum of the first matrix that counts for `equals`, by which parts trained alike are found."""
        counted = (t for t, moves in zip(self.tensors, self.trained, strict=True) if not moves or all(self.trained))
        return next((checksum(tensor) for tensor in counted if tensor.dim() > 1), None)

    def is_disjoint_from(self, other: "_Part") -> bool:
        return not within(self.name, [other.name]) and not within(other.name, [self.name])

    def equals(self, other: "_Part") -> bool:
        """Whether the values are the same, except for what is trained in place, and more than constants."""
        trained = [own or its for own, its in zip(self.trained, other.trained, strict=True)]
        pairs = [
            (own, its)
            for own, its, moves in zip(self.tensors, other.tensors, trained, strict=True)
            if not moves or all(trained)
        ]
        if not any(own.dim() > 1 and not is_constant(own) for own, _ in pairs):
            return False
        return all(checksum(own) == checksum(its) for own, its in pairs)


class _Pair(NamedTuple):
    origin: _Part
    part: _Part
    equal: bool


def find_copies(module: nn.Module, held: Collection[int] | None = None) -> list[NetworkCopy]:
    """Finds the copies of adapted networks in a module, the largest that there are.

    `held` are the parameters that optimizers have, by `id`, once there are optimizers. A part that is adapted and of
    which they have nothing counts as frozen.
    """
    layers = [entry.name for entry in model_modules(module) if state_of(entry.module) is not None]
    layers += [name.rpartition(".")[0] for name in trained_in_place(module)]
    around = {start for layer in layers for start in (*path_starts(layer), "")}
    alike: dict[object, list[_Part]] = {}
    required = _required_by_author(module)
    for part in _parts(module, held, required):
        alike.setdefault(part.layout, []).append(part)
    found = [copy for copy in sharing_copies(module, required) if copy.origin in around]
    pretrained = _of_pretrained(module)
    for parts in alike.values():  # in the order of the module: outer parts first
        copied = {copy.name for copy in found}
        free = [part for part in parts if not within(part.name, copied)]
        adapted = [part for part in free if part.name in around]
        if len(free) < 2 or not adapted:
            continue
        origins = [part for part in adapted if part.needs_gradient] or adapted[:1]
        copies = (_copy_of(pair, module, pretrained) for pair in _pairs(origins, free))
        found += [copy for copy in copies if copy is not None]
    return found


def _pairs(origins: list[_Part], parts: list[_Part]) -> Iterator[_Pair]:
    """Yields each part with the first origin that it equals, as a target has its critic.

    Where it equals none, with the first of all. Of an origin itself, those before it count. Equal checksums are looked
    up, as thousands of layers may have one layout.
    """
    place = {origin.name: at for at, origin in enumerate(origins)}
    by_checksum: dict[tuple[bool, ...], dict[int | None, list[_Part]]] = defaultdict(lambda: defaultdict(list))
    for origin in origins:
        by_checksum[origin.trained][origin.first_checksum].append(origin)
    for part in parts:
        end = place.get(part.name, len(origins))
        near = list(by_checksum[part.trained][part.first_checksum])
        for trained, by_sum in by_checksum.items():
            if trained != part.trained:  # whose checksums are of other tensors
                near += chain(*by_sum.values())
        near.sort(key=lambda origin: place[origin.name])
        equal = next((o for o in near if place[o.name] < end and part.is_disjoint_from(o) and part.equals(o)), None)
        disjoint = (origin for origin in islice(origins, end) if part.is_disjoint_from(origin))
        if (found := equal or next(disjoint, None)) is not None:
            yield _Pair(found, part, equal is not None)


def _copy_of(pair: _Pair, module: nn.Module, pretrained: Mapping[str, Fingerprint]) -> NetworkCopy | None:
    """Returns a part as a copy of another one of its layout; None if it is none."""
    origin, part, equal = pair
    frozen = origin.needs_gradient and not part.needs_gradient
    if not frozen and (not equal or are_repeated(module, origin.name, part.name)):
        return None
    began = equal or _began_equal(origin.name, part.name, pretrained)
    return NetworkCopy(origin.name, part.name, equal, began, frozen)


def _of_pretrained(module: nn.Module) -> dict[str, Fingerprint]:
    """Returns the fingerprints of what weights were that hold an earlier merge, or were moved by hand since."""
    kept = {
        full_name(path, name): values
        for (path, _), adapter in adapters_by_place(module).items()
        for name, values in adapter.kept.items()
    }
    return {**kept, **merged_weights(module)}


def _began_equal(first: str, second: str, pretrained: Mapping[str, Fingerprint]) -> bool:
    """Whether two parts have merged weights, and those of the same pretrained ones."""
    own, its = (
        {name.removeprefix(f"{part}."): values for name, values in pretrained.items() if within(name, [part])}
        for part in (first, second)
    )
    return own == its and bool(own) and all(own.values())


def _parts(module: nn.Module, held: Collection[int] | None, required: Mapping[str, bool]) -> list[_Part]:
    """Returns all parts of a module that have parameters, outer ones first."""
    modules = model_modules(module)
    parameters = own_parameters(modules)
    trained = trained_in_place(module)
    members: dict[str, list[str]] = {}
    for name in parameters:
        for around in path_starts(name)[1:]:
            members.setdefault(around, []).append(name)
    parts = []
    for entry in modules[1:]:
        names = members.get(entry.name, [])
        tensors = tuple(parameters[name] for name in names)
        if not names or any(map(is_lazy, tensors)):
            continue
        layout = tuple((n.removeprefix(f"{entry.name}."), parameters[n].shape, parameters[n].dtype) for n in names)
        in_place = tuple(name in trained for name in names)
        needed = any(required[name] for name in names) and not _is_left_out(entry.module, held)
        parts.append(_Part(entry.name, layout, tensors, in_place, needed))
    return parts


def _is_left_out(part: nn.Module, held: Collection[int] | None) -> bool:
    """Whether a part is adapted and in no optimizer."""
    return held is not None and bool(adapter_tensors(part)) and not any(id(p) in held for p in part.parameters())


def _required_by_author(module: nn.Module) -> dict[str, bool]:
    """Returns by name which parameters required a gradient before there were adapters."""
    required = {name: p.requires_grad for name, p in own_parameters(model_modules(module)).items()}
    for path, target in adapted_targets(module).items():
        before = present_state(target).requires_grad
        required.update({full_name(path, name): needed for name, needed in before.items()})
    return required
