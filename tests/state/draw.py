"""Draws the next call: mostly one that has to succeed, so that runs get somewhere."""

from collections.abc import Callable
from random import Random

import torch

from tests.state.machine import Machine
from tests.state.rules import Step, all_mix
from tests.state.spec import Spec
from tests.state.zoo import BLOCKS, ROWS, saves

NAMES = ("a", "b", "c", "half", "d-1")
"""Names of adapters; one of them is that of a method of every module."""

TYPES = ("float64", "float32", "bfloat16", "float16")

SLOTS = 3
"""Folders that adapters are saved into."""

Drawer = Callable[[Random, Machine], Step]


def draw_blocks(random: Random) -> tuple[str, ...]:
    """Draws the blocks of a model: few, so that each of them meets many calls."""
    return tuple(sorted(random.sample(list(BLOCKS), random.choice((1, 1, 2, 2, 3)))))


def draw_step(random: Random, machine: Machine) -> Step:
    """Draws one call that fits the state, or one of ten that need not."""
    weights = {kind: weight(machine) if callable(weight) else weight for kind, weight in _WEIGHTS.items()}
    if random.random() < 0.1:
        anywhere = {"add", "load_base", "mode", "copy", "look", "broken_forward", "lay_out"}
        possible = set(weights) if machine.lora else anywhere
        possible -= set() if machine.saved else {"load", "move", "swap"}
        possible -= {"cast"} if machine.reference.was_cast else set()
        weights = {kind: 1 for kind in weights if kind in possible}
    kind = _weighted(random, {kind: weight for kind, weight in weights.items() if weight > 0})
    return Step(kind, _ARGUMENTS[kind](random, machine) if kind in _ARGUMENTS else {})


def _weighted(random: Random, weights: dict[str, float]) -> str:
    """As `random.choices`, whose weights the generators of hypothesis pass over."""
    left = random.random() * sum(weights.values())
    for kind, weight in weights.items():
        left -= weight
        if left < 0:
            return kind
    return next(iter(weights))


def draw_spec(random: Random, machine: Machine) -> Spec:
    """Draws an adapter."""
    reference = machine.reference
    known = list(reference.sites)
    sites = tuple(site for site in known if random.random() < 0.75) or (random.choice(known),)
    stored = any(f"{site}.{t}" in reference.stored for site in sites for t in reference.sites[site].tensors.values())
    kept = {name.rpartition(".")[0] for name in reference.stored}
    saved = [name for name in saves(machine.model) if random.random() < (0.02 if name in kept else 0.2)]
    sites = tuple(site for site in sites if not any(f"{site}.".startswith(f"{root}.") for root in saved)) or sites
    fused = [site for site in sites if reference.sites[site].parts]
    outputs = all(reference.sites[group[0]].outputs for group in reference.groups(sites))
    read = any(reference.sites[site].read for site in sites)
    drops = all(reference.sites[group[0]].drops and reference.of_one_type(group) for group in reference.groups(sites))
    odd = random.random() < 0.05  # of a spec that may have to be refused
    one = random.choice(sites)
    changing = random.choice(("pissa", "olora", "loftq"))
    inits = ("kaiming", "gaussian", "orthogonal", "none", "none", changing)
    init = random.choice(inits if odd or not stored else inits[:-1])
    ranks = (2, 4) if init == "orthogonal" and not odd else (1, 2, 3, 5)
    return Spec(
        sites=(*sites, "nowhere") if random.random() < 0.02 else sites,
        r=random.choice(ranks),
        alpha=random.choice((1.0, 2.0, 4.0)),
        ranks={one: random.choice(ranks)} if random.random() < 0.3 else {},
        alphas={one: 3.0} if random.random() < 0.2 else {},
        rslora=random.random() < 0.2,
        dropout=1e-9 if (drops or odd) and not read and random.random() < 0.2 else 0.0,
        bias=random.choice(("none", "none", "none", "none", "lora_only", "all")),
        saves=tuple(saved),
        parts={site: tuple(random.sample("qkv", random.choice((1, 2, 3)))) for site in fused if random.random() < 0.4},
        init=init,
        variant=random.choice(("lora", "lora", "dora", "gated")) if odd or outputs else "lora",
        norm=random.choice(("freeze", "freeze", "freeze", "track")),
        memory=random.choice(("normal", "low")),
        quantize=_storage(random, machine),
    )


def _storage(random: Random, machine: Machine) -> str | None:
    """Now and then a stored base; once there is one, mostly the same."""
    reference = machine.reference
    if random.random() > (0.2 if reference.stored or not reference.adapters else 0.05):
        return None
    present = [stored.storage for stored in reference.stored.values()]
    return random.choice(("nf4", "int8", *4 * present))


def _adapter(random: Random, machine: Machine) -> str:
    known = list(machine.reference.adapters)
    return random.choice(known) if known and random.random() < 0.95 else random.choice(NAMES)


def _new_name(random: Random, machine: Machine) -> str:
    free = [name for name in NAMES if name not in machine.reference.adapters]
    return random.choice(free) if free and random.random() < 0.95 else random.choice((*NAMES, "no/name"))


def _add(random: Random, machine: Machine) -> dict:
    return {"name": _new_name(random, machine), "spec": draw_spec(random, machine), "new": random.random() < 0.3}


def _set(random: Random, machine: Machine) -> dict:
    names = [_adapter(random, machine) for _ in range(random.choice((1, 1, 1, 2, 2, 3)))]
    if random.random() < 0.95:
        names = list(dict.fromkeys(names))
    found = {"names": tuple(names), "trainable": random.random() < 0.8}
    if random.random() < 0.4:
        found["weights"] = tuple(random.choice((1.0, 0.5, -1.25, 0.0)) for _ in names)
    return found


def _merge(random: Random, machine: Machine) -> dict:
    active = machine.reference.active
    names = (
        None if random.random() < 0.6 or not active else tuple(random.sample(active, random.randint(1, len(active))))
    )
    if names and random.random() < 0.1:
        names = (*names, random.choice(names))
    return {"names": names, "max_error": random.choice((0.1, 1e9))}


def _plain(machine: Machine, mixing: bool) -> list[str]:
    """The adapters that can be combined, or mixed in one batch."""
    reference = machine.reference
    return [
        name
        for name, adapter in reference.adapters.items()
        if adapter.spec.variant == "lora"
        and not adapter.changes_base
        and not (mixing and not all_mix(reference, adapter))
    ]


def _mixed(random: Random, machine: Machine) -> dict:
    plain = _plain(machine, mixing=True)
    names = plain if random.random() < 0.9 else [_adapter(random, machine)]
    return {"rows": tuple(random.choice((None, *names, *names)) for _ in range(ROWS))}


def _combine(random: Random, machine: Machine) -> dict:
    plain = _plain(machine, mixing=False)
    names = plain if plain and random.random() < 0.9 else [_adapter(random, machine)]
    adapters = tuple(random.choice(names) for _ in range(random.choice((1, 2, 2, 3))))
    return {
        "adapters": adapters,
        "weights": tuple(random.choice((1.0, 0.5, -1.0, 0.0)) for _ in adapters),
        "name": _new_name(random, machine),
        "way": random.choice(("cat", "linear", "svd")),
    }


def _saved(random: Random, machine: Machine) -> int:
    return random.choice(list(machine.saved))


def _swap(random: Random, machine: Machine) -> dict:
    slot = _saved(random, machine)
    own = machine.saved[slot].name
    return {"slot": slot, "name": own if random.random() < 0.7 else _adapter(random, machine)}


def _way(random: Random, machine: Machine) -> str:
    """How torch converts: it swaps no tensors that a graph holds, and new ones are no longer shared."""
    fits = {"swap": not machine.pending, "overwrite": _is_unshared(machine) and not machine.reference.contexts}
    return random.choice(("data", *(way for way, possible in fits.items() if possible)))


def _is_unshared(machine: Machine) -> bool:
    return all(name == first for name, first in machine.reference.first.items())


def _assign(random: Random, machine: Machine) -> bool:
    """Whether loaded tensors replace those of the model: not where two names share one, which would come apart."""
    return random.random() < 0.3 and _is_unshared(machine)


_ARGUMENTS: dict[str, Callable[[Random, Machine], dict]] = {
    "add": _add,
    "look": lambda random, machine: {"spec": draw_spec(random, machine)},
    "set": _set,
    "delete": lambda random, machine: {"name": _adapter(random, machine)},
    "merge": _merge,
    "unload": lambda random, machine: {"dequantize": random.choice((None, False, False, True))},
    "merge_and_unload": lambda random, machine: {
        "max_error": random.choice((0.1, 1e9)),
        "dequantize": random.random() < 0.3,
    },
    "mixed": _mixed,
    "mode": lambda random, machine: {"training": random.random() < 0.5},
    "cast": lambda random, machine: {
        "dtype": random.choice([name for name in TYPES if getattr(torch, name) != machine.dtype]),
        "way": _way(random, machine),
    },
    "close": lambda random, machine: {"failing": random.random() < 0.3},
    "broken_forward": lambda random, machine: {
        "module": random.choice([name for name, _ in machine.model.named_modules() if name and "lora_" not in name])
    },
    "lay_out": lambda random, machine: {"channels_last": random.random() < 0.7},
    "forward": lambda random, machine: {"of_input": random.random() < 0.5},
    "scramble": lambda random, machine: {"name": _adapter(random, machine), "seed": random.randrange(1000)},
    "combine": _combine,
    "save": lambda random, machine: {
        "slot": random.randrange(SLOTS),
        "name": _adapter(random, machine) if random.random() < 0.8 else None,
    },
    "load": lambda random, machine: {
        "slot": _saved(random, machine),
        "name": _new_name(random, machine) if random.random() < 0.8 else None,
    },
    "swap": _swap,
    "move": lambda random, machine: {"slot": _saved(random, machine)},
    "load_base": lambda random, machine: {"seed": random.choice((None, 1, 2, 3)), "assign": _assign(random, machine)},
    "load_own": lambda random, machine: {"assign": _assign(random, machine)},
    "copy": lambda random, machine: {
        "way": random.choice(("deepcopy", "pickle")),
        "keep": random.choice(("copy", "original")),
    },
}


def _adapted(weight: float) -> Callable[[Machine], float]:
    return lambda machine: weight if machine.reference.adapters else 0


def _idle(weight: float) -> Callable[[Machine], float]:
    """For calls that a context or a merge refuses: rare there."""
    return lambda machine: (
        0
        if not machine.reference.adapters
        else weight * (0.15 if machine.reference.contexts or machine.reference.merged else 1)
    )


def _missing(machine: Machine) -> float:
    idle = not (machine.reference.contexts or machine.reference.merged)
    return {0: 30, 1: 6, 2: 2, 3: 1}.get(len(machine.reference.adapters), 0.3) * (1 if idle else 0.15)


_WEIGHTS: dict[str, float | Callable[[Machine], float]] = {
    "add": _missing,
    "scramble": _adapted(6),
    "set": _idle(6),
    "delete": _idle(1),
    "merge": lambda machine: _adapted(3)(machine) * (0.2 if machine.reference.contexts else 1),
    "unmerge": lambda machine: 6 if machine.reference.merged else 0.05 * _adapted(1)(machine),
    "unload": _idle(0.5),
    "merge_and_unload": _adapted(0.6),
    "disable": _idle(2),
    "mixed": lambda machine: _idle(5 if _plain(machine, mixing=True) and not machine.reference.training else 0.3)(
        machine
    ),
    "close": lambda machine: 6 if machine.reference.contexts else 0,
    "mode": 5,
    "broken_forward": 1,
    "lay_out": 0.3,
    "cast": lambda machine: 0 if machine.reference.was_cast else 0.7,
    "train_step": _idle(4),
    "forward": _adapted(2),
    "backward": lambda machine: 2 if machine.pending else 0,
    "combine": _idle(1.5),
    "save": lambda machine: _adapted(2)(machine) * (0.2 if machine.reference.merged else 1),
    "load": lambda machine: 1.5 if machine.saved and len(machine.reference.adapters) < len(NAMES) else 0,
    "swap": lambda machine: _idle(1.5)(machine) if machine.saved else 0,
    "move": lambda machine: 0.7 if machine.saved and not machine.reference.contexts else 0,
    "load_base": 0.7,
    "look": 1,
    "snap": _idle(1),
    "load_own": _idle(1),
    "copy": 1.5,
}
"""How often each kind of call is drawn, by what it needs."""
