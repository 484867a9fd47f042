"""Divergences that are known and not repaired yet: steps that would show them are passed over.

Each entry goes when its cause is repaired; `test_known.py` holds a reproduction of each, which fails once it is.
"""

from collections.abc import Callable

from tests.state.machine import Machine
from tests.state.rules import Step

CHANGES = frozenset(
    {"add", "load", "set", "delete", "merge", "unmerge", "unload", "merge_and_unload", "combine"}
    | {"load_base", "load_own"}
)
"""Calls that a context refuses."""


def _third_party_branch(machine: Machine, step: Step) -> bool:
    """A variant on a third party's layer, with dropout, or beside plain LoRA that is named first."""
    spec = step.arguments.get("spec")
    if step.kind == "set":
        adapters = [machine.reference.adapters.get(name) for name in step.arguments["names"]]
        found = [adapter.spec for adapter in adapters if adapter and "bilinear.form" in adapter.spec.sites]
        return len(found) > 1 and any(spec.variant != "lora" for spec in found)
    return bool(spec and spec.dropout and spec.variant != "lora" and "bilinear.form" in spec.sites)


def _half_precision(machine: Machine, step: Step) -> bool:
    """A head or bias that is trained in half precision takes another type than the model has it in."""
    if machine.dtype.itemsize > 2:
        return False
    if step.kind == "add":
        spec = step.arguments["spec"]
        return bool(spec.saves or spec.bias != "none")
    return False


def _base_state_dict(machine: Machine, step: Step) -> bool:
    """A base state dict changes what is the adapter's, and leaves fingerprints and stored bases as they were."""
    return step.kind == "load_base" and bool(machine.reference.adapters)


def _inside(machine: Machine, step: Step) -> bool:
    """Calls inside of a context are not refused, a copy stays inside, an inner context ends `mixed_batch`."""
    if not machine.reference.contexts:
        return False
    mixed = any(context is not None for context in machine.reference.contexts)
    training = step.kind == "mode" and step.arguments["training"]
    return step.kind in CHANGES | {"copy"} or (mixed and (training or step.kind in ("disable", "mixed")))


def _repeated(machine: Machine, step: Step) -> bool:
    """A repeated name counts twice."""
    names = step.arguments.get("names") or ()
    return step.kind in ("set", "merge") and len(set(names)) < len(names)


def _backward(machine: Machine, step: Step) -> bool:
    """A backward after a change of state lacks gradients or gives those of the state after it, silently."""
    changes = {
        "add",
        "load",
        "set",
        "merge",
        "unmerge",
        "delete",
        "unload",
        "merge_and_unload",
        "disable",
        "mixed",
        "close",
    }
    return step.kind == "backward" and bool(machine.pending and machine.pending.changes & changes)


def _whole_and_parts(machine: Machine, step: Step) -> bool:
    """An adapter of a whole layer and one of its parts: KeyError."""
    if step.kind != "combine":
        return False
    adapters = machine.reference.adapters
    found = [adapters[name].slots for name in step.arguments["adapters"] if name in adapters]
    suffixes = {(slot.site, tuple(s.suffix for s in slots if s.site == slot.site)) for slots in found for slot in slots}
    return len({site for site, _ in suffixes}) < len(suffixes)


def _tied_saved(machine: Machine, step: Step) -> bool:
    """A module that is to be trained in full, and whose weight another one names first: it is not trained."""
    spec = step.arguments.get("spec")
    return bool(spec and {"tied.b", "tokens.out"} & set(spec.saves))


def _tied_bias(machine: Machine, step: Step) -> bool:
    """Of layers that share a weight, `lora_only` trains the bias of the first alone."""
    spec = step.arguments.get("spec")
    return bool(spec and spec.bias == "lora_only" and {"tied.a", "tied.b"} <= set(spec.sites))


def _tied_combined(machine: Machine, step: Step) -> bool:
    """Adapters of one layer, which one of them adapts alone and another together with one that shares its weight."""
    if step.kind != "combine":
        return False
    found = [machine.reference.adapters.get(name) for name in step.arguments["adapters"]]
    places = {(slot.weight, slot.targets) for adapter in found if adapter for slot in adapter.slots}
    return len({weight for weight, _ in places}) < len(places)


def _thawed(machine: Machine, step: Step) -> bool:
    """The norms that the adapters that are left freeze move, until the next change."""
    reference = machine.reference
    name = step.arguments.get("name")
    if step.kind != "delete" or not set(reference.active) <= {name}:
        return False
    frozen = [adapter.frozen for adapter in reference.adapters.values()]
    rest = [adapter.frozen for other, adapter in reference.adapters.items() if other != name]
    return bool(rest) and frozenset.intersection(*frozen) != frozenset.intersection(*rest)


def _fused_above(machine: Machine, step: Step) -> bool:
    """The parts of a layer are asked of the layers below it too."""
    if step.kind != "combine":
        return False
    found = [machine.reference.adapters.get(name) for name in step.arguments["adapters"]]
    sites = {slot.site for adapter in found if adapter for slot in adapter.slots}
    parts = {site for adapter in found if adapter for site in adapter.spec.parts}
    return any(site.startswith(f"{fused}.") for site in sites for fused in parts)


def _separate_parts(machine: Machine, step: Step) -> bool:
    """Parts of an attention with separate projections are combined as if they were the whole: KeyError."""
    if step.kind != "combine":
        return False
    found = [machine.reference.adapters.get(name) for name in step.arguments["adapters"]]
    return any(len(set(adapter.spec.parts.get("cross.mha", "qkv"))) < 3 for adapter in found if adapter)


def _saved_inside(machine: Machine, step: Step) -> bool:
    """The first save of an adapter inside of `mixed_batch` puts the active adapter's heads in place."""
    return step.kind == "save" and bool(machine.reference.contexts)


def _dropped_tie(machine: Machine, step: Step) -> bool:
    """Dropout on a layer that another adapter forms the weight of: refused in the backward, for another reason."""
    if step.kind != "set":
        return False
    reference = machine.reference
    specs = [reference.adapters[name].spec for name in step.arguments["names"] if name in reference.adapters]
    tied = {name for spec in specs for group in reference.groups(spec.sites) if len(group) > 1 for name in group}
    return any(spec.dropout and tied & set(spec.sites) for spec in specs)


KNOWN: dict[str, Callable[[Machine, Step], bool]] = {
    "S1": _third_party_branch,
    "S2": _half_precision,
    "S3": _base_state_dict,
    "S4": _inside,
    "S5": _repeated,
    "S7": _backward,
    "S12": _fused_above,
    "S13": _whole_and_parts,
    "N1": _tied_saved,
    "N2": _tied_bias,
    "N3": _tied_combined,
    "N4": _thawed,
    "N5": _separate_parts,
    "N6": _saved_inside,
    "N7": _dropped_tie,
}
"""By number, which steps in which states show a known divergence."""


def known(machine: Machine, step: Step, ignored: frozenset[str] = frozenset()) -> str | None:
    """Returns the number of the known divergence that a step would show, if any.

    Args:
        machine: The state.
        step: What is about to be done.
        ignored: Numbers not to pass over.
    """
    return next((name for name, shows in KNOWN.items() if name not in ignored and shows(machine, step)), None)
