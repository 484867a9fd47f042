"""Which calls are allowed in which state: the semantics that the judge holds against.

For each kind of call, a function yields the errors that fit the present state; any of them is right, and none at all
means that the call has to succeed. `MaybeError` stands for a limit of what is built, such as a layer type that cannot
mix: there the call may be refused, and if it is not, what it gives is judged like anything else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_plugins import AdapterFileError, ConfigError, LoraError, MergeError, StateError, TargetError
from tests.state.reference import Adapter, PlannedSlot, Reference
from tests.state.spec import CHANGING, Spec
from tests.state.stored import Stored

THIRD_PARTY = "bilinear.form"
"""The layer of a third party's type, whose branch does not take the matrix of a variant."""


class MaybeError(LoraError):
    """Stands for any refusal of lora_plugins, which may come and may not."""


@dataclass(frozen=True)
class Step:
    """One call, as plain data.

    Args:
        kind: Which one; the name of a method of `Machine` and of a rule.
        arguments: What it is called with.
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return ", ".join(
            [f"Step({self.kind!r}", f"dict({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())}))"]
        )


@dataclass
class Saved:
    """An adapter that was saved: what it was, and the base that it was saved on."""

    name: str
    adapter: Adapter
    base: dict[str, torch.Tensor]
    plain: frozenset[str]
    stored: dict[str, Stored] = field(default_factory=dict)
    was_cast: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base."""
        return next(tensor.dtype for tensor in self.base.values() if tensor.is_floating_point())


Errors = Iterator[type[LoraError]]


def errors_of(step: Step, reference: Reference, saved: dict[int, Saved]) -> set[type[LoraError]]:
    """Returns the errors that a call may be refused with; empty if it has to succeed."""
    rule = _RULES.get(step.kind)
    return set(rule(reference, saved, **step.arguments)) if rule else set()


def _idle(reference: Reference, *, merged: bool = True) -> Errors:
    """What all calls have in common that change the adapters: not in a context, mostly not while merged."""
    if reference.contexts or (merged and reference.merged):
        yield StateError


def _known(reference: Reference, *names: str | None) -> Errors:
    if any(name is not None and name not in reference.adapters for name in names) or not reference.adapters:
        yield StateError


def _new(reference: Reference, name: str) -> Errors:
    if name in reference.adapters or not name.replace("-", "").replace("_", "").isalnum():
        yield ConfigError


def _add(reference: Reference, saved: Any, name: str, spec: Spec, **_: Any) -> Errors:
    yield from _idle(reference)
    yield from _new(reference, name)
    yield from _fits(reference, spec)


def _look(reference: Reference, saved: Any, spec: Spec) -> Errors:
    yield from _plans(reference, spec)
    if any(_starts(reference, spec)):
        yield MaybeError  # a plan need not know what the init finds


def _fits(reference: Reference, spec: Spec) -> Errors:
    yield from _plans(reference, spec)
    yield from _starts(reference, spec)


def _plans(reference: Reference, spec: Spec) -> Errors:
    """What stands against an adapter before anything is computed."""
    if any(name not in reference.sites for name in spec.sites):
        yield TargetError
        return
    adapter = reference.plan(spec)
    groups = reference.groups(spec.sites)
    saved = {alias for root in spec.saves for alias in reference.aliases.get(root, (root,))}
    if any(name == root or name.startswith(f"{root}.") for name in spec.sites for root in saved):
        yield TargetError  # it is trained in full, so it is no target
    if {reference.first.get(slot.weight) for slot in adapter.slots} & set(adapter.trained):
        yield TargetError
    if spec.variant != "lora" and not all(reference.sites[group[0]].outputs for group in groups):
        yield TargetError
    if spec.dropout and not all(reference.of_one_type(group) and reference.sites[group[0]].drops for group in groups):
        yield TargetError
    if spec.dropout and spec.variant != "lora" and THIRD_PARTY in spec.sites:
        yield TargetError  # its branch does not take the matrix of a variant, so dropout has no place to act
    if spec.init in CHANGING and any(reference.is_computed(slot.site) for slot in adapter.slots):
        yield TargetError
    yield from _stores(reference, spec, adapter)


def _stores(reference: Reference, spec: Spec, adapter: Adapter) -> Errors:
    """What stands against storing weights, and against training or replacing those that are stored."""
    if reference.stored.keys() & set(adapter.trained):
        yield TargetError
    updated = {reference.first.get(slot.weight) for slot in adapter.slots}
    if spec.init in CHANGING and updated & reference.stored.keys():
        yield TargetError  # it cannot start from the float value, which is gone
    adapted = {site for other in reference.adapters.values() for site in other.spec.sites}
    for weight in reference.weights_of(spec.sites) if spec.quantize else ():
        present = reference.stored.get(weight)
        holders = {site for site in spec.sites if weight in reference.weights_of([site])}
        if present is not None and present.storage != spec.quantize:
            yield TargetError
        if present is None and (adapted & holders or any(reference.is_computed(site) for site in holders)):
            yield TargetError  # an adapter was trained on its float value


def _owned(reference: Reference, weight: str) -> bool:
    """Whether an adapter has a value of its own of a weight."""
    return any(weight in adapter.values for adapter in reference.adapters.values())


def _starts(reference: Reference, spec: Spec) -> Errors:
    """What stands against the first values of an adapter."""
    if any(name not in reference.sites for name in spec.sites):
        return
    slots = reference.plan(spec).slots
    if spec.init == "orthogonal" and any(slot.r % 2 for slot in slots):
        yield TargetError  # it splits the rank in two
    if spec.init in CHANGING and any(reference.sharing(slot) - set(slot.targets) for slot in slots):
        yield MergeError
    new = reference.weights_of(spec.sites).keys() - reference.stored.keys() if spec.quantize else set()
    if {name for name, first in reference.first.items() if first in new} - _names(reference, spec):
        yield MergeError
    if any(_owned(reference, name) for name in new):
        yield TargetError


def _names(reference: Reference, spec: Spec) -> set[str]:
    """All names of the weights of the layers of a spec."""
    return {
        f"{alias}.{tensor}"
        for site in spec.sites
        for tensor in reference.sites[site].tensors.values()
        for alias in reference.aliases[site]
    }


def _is_stored(reference: Reference, slot: PlannedSlot) -> bool:
    return reference.first.get(slot.weight) in reference.stored


def _set(
    reference: Reference, saved: Any, names: tuple[str, ...], weights: tuple[float, ...] | None = None, **_: Any
) -> Errors:
    yield from _idle(reference)
    for name, weight in zip(names, weights or (), strict=False):
        if weight != 1 and name in reference.adapters and reference.adapters[name].values:
            yield StateError  # a head has no weight
    yield from _known(reference, *names)
    if len(set(names)) < len(names):
        yield ConfigError
    values = [set(reference.adapters[name].values) for name in dict.fromkeys(names) if name in reference.adapters]
    if sum(map(len, values)) > len(set().union(*values)):
        yield StateError
    if any(_needs_effective_weight(reference, names, site) for site in _dropped(reference, names)):
        yield StateError  # dropout cannot act on a weight


def _dropped(reference: Reference, names: tuple[str, ...]) -> set[str]:
    """The layers on which an adapter has dropout."""
    specs = [reference.adapters[name].spec for name in names if name in reference.adapters]
    return {site for spec in specs if spec.dropout for site in spec.sites}


def _needs_effective_weight(reference: Reference, names: tuple[str, ...], site: str) -> bool:
    """Whether an adapter ties a layer to one of another type, or is of a variant that its branch does not know."""
    specs = [reference.adapters[name].spec for name in names if name in reference.adapters]
    tied = [group for spec in specs for group in reference.groups(spec.sites) if not reference.of_one_type(group)]
    variants = [spec for spec in specs if spec.variant != "lora" and site in spec.sites]
    return any(site in group[1:] for group in tied) or (site == THIRD_PARTY and bool(variants))


def _copy(reference: Reference, saved: Any, way: str, keep: str) -> Errors:
    if reference.contexts:
        yield StateError


def _delete(reference: Reference, saved: Any, name: str) -> Errors:
    yield from _idle(reference)
    yield from _known(reference, name)


def _merge(reference: Reference, saved: Any, names: tuple[str, ...] | None, **_: Any) -> Errors:
    yield from _idle(reference, merged=False)
    yield from _known(reference, *(names or ()))
    chosen = tuple(name for name in reference.active if name not in reference.merged) if names is None else names
    if len(set(chosen)) < len(chosen):
        yield ConfigError
    if any(name not in reference.active or name in reference.merged for name in chosen):
        yield StateError
    if not chosen:
        yield MaybeError
    yield from _writes(reference, chosen)


def _writes(reference: Reference, names: tuple[str, ...]) -> Errors:
    """What stands against writing updates into the weights."""
    chosen = [reference.adapters[name] for name in names if name in reference.adapters]
    variants = any(reference.adapters[name].spec.variant != "lora" for name in reference.active)
    if variants and set(reference.active) not in (set(names), set(reference.merged)):
        yield StateError  # the update of a variant depends on the untouched weight
    for adapter in chosen:
        if any(reference.sharing(slot) - set(slot.targets) for slot in adapter.slots):
            yield MergeError
    if _may_be_lost(reference, tuple(name for name in names if name in reference.adapters)):
        yield MaybeError


def _may_be_lost(reference: Reference, names: tuple[str, ...]) -> bool:
    """Whether rounding may take a tenth of an update: it is small against its weight."""
    share = 32 * torch.finfo(reference.dtype).eps
    weights = reference.effective((), {})
    return any(
        0 < float(delta.norm()) < share * float(weights[name].detach().norm())
        for name, delta in reference.deltas(names, weighted=True).items()
    )


def _unmerge(reference: Reference, saved: Any) -> Errors:
    yield from _idle(reference, merged=False)
    if not reference.merged:
        yield StateError


def _unload(reference: Reference, saved: Any, dequantize: bool | None = None) -> Errors:
    yield from _idle(reference, merged=False)
    if not (dequantize and reference.stored):  # which become dense also where no adapter is left
        yield from _known(reference)


def _merge_and_unload(reference: Reference, saved: Any, dequantize: bool = False, **_: Any) -> Errors:
    yield from _unload(reference, saved)
    yield from _writes(reference, tuple(name for name in reference.active if name not in reference.merged))
    acting = [reference.adapters[name] for name in reference.active]
    if not dequantize and any(_is_stored(reference, slot) for adapter in acting for slot in adapter.slots):
        yield MaybeError  # what is lost by storing it again is judged where it was allowed


def _disable(reference: Reference, saved: Any) -> Errors:
    yield from _known(reference)
    if reference.merged:
        yield StateError


def _mixed(reference: Reference, saved: Any, rows: tuple[str | None, ...]) -> Errors:
    yield from _known(reference, *rows)
    if reference.merged or reference.training:
        yield StateError
    for name in set(rows) & set(reference.adapters):
        adapter = reference.adapters[name]
        if adapter.values or adapter.spec.variant != "lora" or not all_mix(reference, adapter):
            yield MaybeError


def all_mix(reference: Reference, adapter: Adapter) -> bool:
    """Whether all layers of an adapter can have other adapters for other rows."""
    groups = reference.groups(adapter.spec.sites)
    return all(reference.of_one_type(group) and reference.sites[group[0]].mixes for group in groups)


def _combine(
    reference: Reference, saved: Any, adapters: tuple[str, ...], weights: tuple[float, ...], name: str, **_: Any
) -> Errors:
    yield from _idle(reference)
    yield from _known(reference, *adapters)
    yield from _new(reference, name)
    found = [reference.adapters[adapter] for adapter in adapters if adapter in reference.adapters]
    if any(adapter.changes_base or adapter.spec.variant != "lora" for adapter in found):
        yield StateError
    places: dict[str, list[tuple[str, ...]]] = {}
    for adapter in found:
        for site in {slot.site for slot in adapter.slots}:
            places.setdefault(site, []).append(tuple(slot.suffix for slot in adapter.slots if slot.site == site))
    if any(len(set(parts)) > 1 for parts in places.values()):
        yield ConfigError
    shared: dict[str, set[tuple[str, ...]]] = {}
    for slot in (slot for adapter in found for slot in adapter.slots):
        shared.setdefault(reference.first.get(slot.weight, slot.weight), set()).add(slot.targets)
    if any(len(targets) > 1 for targets in shared.values()):
        yield MaybeError  # one adapts layers that share a weight together, another one of them alone
    trained = {name for adapter in found for name in adapter.trained}
    if any(reference.first.get(slot.weight) in trained for adapter in found for slot in adapter.slots):
        yield ConfigError
    if found:
        sites = tuple({site for adapter in found for site in adapter.spec.sites})
        saves = tuple({root for adapter in found for root in adapter.spec.saves})
        yield from _fits(reference, Spec(sites, saves=saves))
    if _negative_variance(reference, found, weights):
        yield ConfigError


def _negative_variance(reference: Reference, found: list[Any], weights: tuple[float, ...]) -> bool:
    """Whether the running variance of a norm would be less than 0 in a combination."""
    for key in (key for key in reference.base if key.endswith("running_var")):
        owned = [(adapter.values[key], w) for adapter, w in zip(found, weights, strict=False) if key in adapter.values]
        base = reference.base[key].double()
        total = base + sum(w * (value.double() - base) for value, w in owned)
        if owned and bool((total.to(reference.base[key].dtype) < 0).any()):
            return True
    return False


def _save(reference: Reference, saved: Any, name: str | None, **_: Any) -> Errors:
    yield from _known(reference, name)
    if reference.merged or (name is None and len(reference.active) != 1):
        yield StateError
    if name is None and reference.contexts:
        yield MaybeError  # it is not said what is active inside of a context


def _of_this_base(reference: Reference, found: Saved) -> Errors:
    """What stands against a file that was saved on another base."""
    if found.plain != reference.plain:
        yield AdapterFileError
        yield MaybeError
        return
    yield from _same_stored(reference, found)
    for weight in {slot.weight for slot in found.adapter.slots}:
        if reference.first.get(weight) not in found.stored:
            yield from _same_base(reference, found, weight)


def _load(reference: Reference, saved: dict[int, Saved], slot: int, name: str | None) -> Errors:
    found = saved[slot]
    yield from _idle(reference)
    yield from _new(reference, found.name if name is None else name)
    yield from _of_this_base(reference, found)
    if found.adapter.changes_base and (found.was_cast or found.dtype != reference.dtype):
        yield AdapterFileError
        yield MaybeError  # what an init has changed is made again from the base in the type that it had then


def _swap(reference: Reference, saved: dict[int, Saved], slot: int, name: str) -> Errors:
    found = saved[slot]
    yield from _idle(reference)
    yield from _known(reference, name)
    yield from _of_this_base(reference, found)
    if found.stored.keys() - reference.stored.keys():
        yield AdapterFileError
        yield MaybeError  # nothing is stored anew; weights that it does not need may be stored elsewhere
    if name in reference.adapters and not _same_places(reference.adapters[name], found.adapter):
        yield AdapterFileError


def _same_places(own: Adapter, other: Adapter) -> bool:
    """Whether the tensors of one adapter can hold those of another, to the same effect."""
    there, given = _places(own), _places(other)
    fits = all(
        site in there and rank <= there[site][0] and slots == there[site][1] for site, (rank, slots) in given.items()
    )
    return (
        fits
        and own.spec.variant == other.spec.variant
        and (own.spec.variant == "lora" or given.keys() == there.keys())
        and (own.spec.variant != "gated" or _sizes(own) == _sizes(other))  # it rescales no rows
        and {*own.trained, *own.buffers} == {*other.trained, *other.buffers}
        and not (own.changes_base or other.changes_base)
    )


def _sizes(adapter: Adapter) -> set[tuple[str, int, float]]:
    """Rank and scaling of each layer."""
    return {(slot.site, len(adapter.tensors[slot.key("A")]), slot.scaling) for slot in adapter.slots}


def _places(adapter: Adapter) -> dict[str, tuple[int, list[object]]]:
    """The rank of each layer, and where the update of each of its parts goes."""
    places: dict[str, tuple[int, list[object]]] = {}
    for slot in adapter.slots:
        rank = len(adapter.tensors[slot.key("A")])  # that of a combination is the sum of those that it was made of
        places.setdefault(slot.site, (rank, []))[1].append((slot.suffix, slot.targets))
    return places


def _same_stored(reference: Reference, found: Saved) -> Errors:
    """A file holds how the base was stored, and a sum of it."""
    if reference.stored.keys() - found.stored.keys():
        yield AdapterFileError
    for name, there in found.stored.items():
        here = reference.stored.get(name)
        if here is not None and not (here.storage == there.storage and here.same_bits(there)):
            yield AdapterFileError
        if here is None and _owned(reference, name):
            yield AdapterFileError
        if here is None and any(name in slot.targets for a in reference.adapters.values() for slot in a.slots):
            yield AdapterFileError
        if here is None and not (_made_again(found, name) and _equal(reference.base[name], there.source)):
            yield AdapterFileError
            yield MaybeError  # other values may be stored as the same


def _move(reference: Reference, saved: dict[int, Saved], slot: int) -> Errors:
    found = saved[slot]
    if not all(_made_again(found, name) for name in found.stored) or (found.adapter.changes_base and found.was_cast):
        yield AdapterFileError
        yield MaybeError


def _made_again(found: Saved, name: str) -> bool:
    """Whether loading a file can store a weight again, to the same bits.

    Of the float value, from which a merge for good made others, nothing is kept. What an init has left of a weight is
    made by loading the adapter of that init, no other.
    """
    there = found.stored[name]
    own = found.adapter.changes_base and any(name in slot.targets for slot in found.adapter.slots)
    return there.exact and (own or not there.residual)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _same_base(reference: Reference, found: Saved, weight: str) -> Errors:
    """A fingerprint tells weights apart that differ by more than a hundredth; in between nothing is promised."""
    names = [name for name in reference.base if name == weight or name.startswith(weight.rpartition(".")[0])]
    names = [reference.first.get(weight, "")] if weight in reference.first else names
    here, there = ([base[name].double() for name in names] for base in (reference.base, found.base))
    off = max(float((a - b).norm() / max(a.norm(), b.norm(), 1e-9)) for a, b in zip(here, there, strict=True))
    if off > 0.3:
        yield AdapterFileError
    elif off > 0:
        yield MaybeError


def _load_base(reference: Reference, saved: Any, **_: Any) -> Errors:
    yield from _idle(reference)
    if any(adapter.changes_base for adapter in reference.adapters.values()):
        yield StateError


def _load_own(reference: Reference, saved: Any, **_: Any) -> Errors:
    yield from _idle(reference)


_RULES: dict[str, Callable[..., Errors]] = {
    "add": _add,
    "look": _look,
    "set": _set,
    "copy": _copy,
    "delete": _delete,
    "merge": _merge,
    "unmerge": _unmerge,
    "unload": _unload,
    "merge_and_unload": _merge_and_unload,
    "disable": _disable,
    "mixed": _mixed,
    "combine": _combine,
    "save": _save,
    "load": _load,
    "swap": _swap,
    "move": _move,
    "load_base": _load_base,
    "load_own": _load_own,
}
