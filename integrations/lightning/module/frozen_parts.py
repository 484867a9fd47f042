"""Frozen parts outside of the targets, such as a teacher or the network of a metric.

Checkpoints leave them out like the frozen base, while they have the values that the module was built with. Flags do
not tell that, so checksums do: they are taken of everything outside when the module is adapted, and compared whenever a
checkpoint is written.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.adapter import adapter_tensors
from lora_plugins.files import fingerprint, same
from lora_plugins.inplace import model_modules, named_tensors, own_buffers, own_parameters
from lora_plugins.integrations.lightning.module.adapted_parts import adapted_targets
from lora_plugins.integrations.lightning.module.bitwise import checksum
from lora_plugins.integrations.lightning.module.moved_tensors import moved_by_hand
from lora_plugins.utils import in_float64, is_dense, plain_name, within

_BUILT = "_lora_built"
"""Attribute of a LightningModule with what its tensors outside of the targets were when it was adapted."""

Fingerprint = dict[str, float]


class _Built(NamedTuple):
    """The values of a tensor when the module was built."""

    dtype: torch.dtype
    total: int
    fingerprint: Fingerprint

    @classmethod
    def of(cls, tensor: Tensor) -> "_Built":
        return cls(tensor.dtype, checksum(tensor), _fingerprint(tensor))

    def has_values_of(self, tensor: Tensor) -> bool:
        return tensor.dtype == self.dtype and checksum(tensor) == self.total

    def was_converted_to(self, tensor: Tensor) -> bool:
        """Whether the values are the same in another type, as after a conversion by a precision plugin."""
        return tensor.dtype != self.dtype and same(self.fingerprint, _fingerprint(tensor))


def note_built(module: nn.Module, names: Collection[str] | None = None) -> None:
    """Records, on the module, the values outside of its targets that it was built with.

    What is noted already stays, since the module may have been trained since, unless it was converted to another type.
    Without `names`, all are noted but those that came with a checkpoint.
    """
    notes = _notes(module)
    for name, tensor in outside(module).items():
        wanted = name not in moved_by_hand(module) if names is None else name in names
        if wanted and (name not in notes or notes[name].was_converted_to(tensor)):
            notes[name] = _Built.of(tensor)
    if notes:  # of plain types: who loads a pickle of the module may have no lora_plugins
        module.__dict__[_BUILT] = {name: tuple(built) for name, built in notes.items()}


def frozen_as_built(module: nn.Module) -> dict[str, Fingerprint]:
    """Returns the tensors outside of the targets that are frozen and have the values that the module was built with.

    Frozen are parameters that require no gradient, and buffers of modules whose parameters are all frozen.

    Returns:
        Their fingerprints, by name.
    """
    notes, moved, frozen = _notes(module), moved_by_hand(module), set(map(plain_name, _frozen(module)))
    return {
        name: notes[name].fingerprint
        for name, tensor in outside(module).items()
        if name in notes and name in frozen and name not in moved and notes[name].has_values_of(tensor)
        if all(map(math.isfinite, notes[name].fingerprint.values()))  # nothing can be compared with others
    }


def not_as_built(module: nn.Module, expected: Mapping[str, Fingerprint]) -> list[str]:
    """Returns the names of tensors that are missing, have other fingerprints, or have changed since."""
    found, notes = outside(module), _notes(module)
    return [
        name
        for name, values in expected.items()
        if name not in found
        or not same(values, _fingerprint(found[name]))
        or (name in notes and not notes[name].has_values_of(found[name]))
    ]


def built_alike(module: nn.Module, expected: Mapping[str, Fingerprint]) -> set[str]:
    """Returns the names of tensors that had the expected fingerprints when they were built, whatever they have now."""
    found, notes = outside(module), _notes(module)
    return {
        name
        for name, values in expected.items()
        if name in found and name in notes and same(values, notes[name].fingerprint)
    }


def outside(module: nn.Module) -> dict[str, Tensor]:
    """Returns the dense tensors of a module that belong to none of its targets, by name; others have no checksums."""
    inside: set[int] = set()
    for target in adapted_targets(module).values():
        modules = model_modules(target)
        own = [*own_parameters(modules).values(), *own_buffers(modules).values()]
        inside |= {id(tensor) for tensor in (*own, *adapter_tensors(target).values())}
    named = named_tensors(module, aliases=True).items()
    return {name: t.detach() for name, t in named if id(t) not in inside and not is_lazy(t) and is_dense(t)}


def _notes(module: nn.Module) -> dict[str, _Built]:
    return {name: _Built(*values) for name, values in module.__dict__.get(_BUILT, {}).items()}


def _frozen(module: nn.Module) -> Iterator[str]:
    """Yields the names of parameters that require no gradient, and of buffers of frozen modules."""
    parts: set[str] = set()
    for name, part in module.named_modules(remove_duplicate=False):  # outer ones first
        if within(name, parts):
            continue
        own = [*part.named_parameters(name, remove_duplicate=False)]
        yield from (full for full, parameter in own if not parameter.requires_grad)
        if own and not any(parameter.requires_grad for _, parameter in own):
            parts.add(name)
            yield from (full for full, _ in part.named_buffers(name, remove_duplicate=False))


def _fingerprint(tensor: Tensor) -> Fingerprint:
    """Returns the fingerprint of a tensor of any type."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return fingerprint(numbers if numbers.is_floating_point() else in_float64(numbers))
