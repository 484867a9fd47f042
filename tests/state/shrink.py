"""Replays calls, and finds the fewest that still show a divergence."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from tests.state.checks import DivergenceError
from tests.state.machine import opened
from tests.state.rules import Step
from tests.state.spec import Spec


@dataclass(frozen=True)
class Case:
    """A model and the calls on it.

    Args:
        blocks: The blocks of the model.
        dtype: Its type.
        seed: Of its weights.
        steps: The calls.
    """

    blocks: tuple[str, ...]
    dtype: torch.dtype
    seed: int
    steps: tuple[Step, ...]


def replay(case: Case) -> tuple[Step, DivergenceError] | None:
    """Carries out a case; returns the divergence and the step that shows it, if any."""
    with opened(case.blocks, case.dtype, case.seed) as machine:
        for step in case.steps:
            try:
                machine.do(step)
            except DivergenceError as divergence:
                return step, divergence
    return None


def signature(step: Step, divergence: DivergenceError) -> tuple[str, str]:
    """Tells divergences apart."""
    return step.kind, divergence.check


def shrink(case: Case, wanted: tuple[str, str], most: int = 400) -> Case:
    """Returns the smallest case that is found to show the same divergence.

    Args:
        case: A case that shows it with its last step.
        wanted: Its signature.
        most: Replays at most.
    """
    tries = 0

    def shows(candidate: Case) -> bool:
        nonlocal tries
        tries += 1
        try:
            found = replay(candidate)
        except Exception:
            return False  # it makes no sense without what was left out
        return found is not None and signature(*found) == wanted

    while tries < most:
        smaller = next((candidate for candidate in _smaller(case) if tries < most and shows(candidate)), None)
        if smaller is None:
            break
        case = smaller
    return case


def _smaller(case: Case) -> Iterator[Case]:
    count = len(case.steps)
    size = count // 2
    while size:
        for start in range(0, count - 1, size):  # never the last one, which shows it
            stop = min(start + size, count - 1)
            yield replace(case, steps=case.steps[:start] + case.steps[stop:])
        size //= 2
    for block in case.blocks if len(case.blocks) > 1 else ():
        steps = tuple(_without_block(step, block) for step in case.steps)
        if all(spec.sites for step in steps if (spec := step.arguments.get("spec"))):  # an empty list is another case
            yield replace(case, blocks=tuple(other for other in case.blocks if other != block), steps=steps)
    for at, step in enumerate(case.steps):
        for simpler in _simpler(step):
            yield replace(case, steps=(*case.steps[:at], simpler, *case.steps[at + 1 :]))


def _without_block(step: Step, block: str) -> Step:
    spec = step.arguments.get("spec")
    if spec is None:
        return step
    keep: Callable[[Sequence[str]], tuple[str, ...]] = lambda names: tuple(  # noqa: E731
        name for name in names if not name.startswith(f"{block}.")
    )
    smaller = replace(
        spec,
        sites=keep(spec.sites),
        saves=keep(spec.saves),
        **{name: {k: v for k, v in getattr(spec, name).items() if keep([k])} for name in ("ranks", "alphas", "parts")},
    )
    return Step(step.kind, step.arguments | {"spec": smaller})


def _simpler(step: Step) -> Iterator[Step]:
    spec = step.arguments.get("spec")
    if spec is None:
        ones = tuple(1.0 for _ in step.arguments.get("weights", ()))
        for key, value in {"max_error": 0.1, "trainable": True, "way": "cat", "weights": ones, "seed": 1}.items():
            if key in step.arguments and step.arguments[key] != value:
                yield Step(step.kind, step.arguments | {key: value})
        for key in ("rows", "names", "adapters"):
            values = step.arguments.get(key) or ()
            if key == "rows":
                yield from (
                    Step(step.kind, step.arguments | {key: (*values[:at], None, *values[at + 1 :])})
                    for at in range(len(values))
                    if values[at] is not None
                )
            elif key == "names" and len(values) > 1:
                yield from (
                    Step(step.kind, step.arguments | {key: (*values[:at], *values[at + 1 :])})
                    for at in range(len(values))
                )
        return
    if step.arguments.get("new"):
        yield Step(step.kind, step.arguments | {"new": False})
    plain = Spec(spec.sites)
    for f in fields(Spec):
        if f.name != "sites" and getattr(spec, f.name) != getattr(plain, f.name):
            yield Step(step.kind, step.arguments | {"spec": replace(spec, **{f.name: getattr(plain, f.name)})})
    for site in spec.sites if len(spec.sites) > 1 else ():
        sites = tuple(other for other in spec.sites if other != site)
        yield Step(step.kind, step.arguments | {"spec": replace(spec, sites=sites)})
    for name in spec.saves:
        saves = tuple(other for other in spec.saves if other != name)
        yield Step(step.kind, step.arguments | {"spec": replace(spec, saves=saves)})
