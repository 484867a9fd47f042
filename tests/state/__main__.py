"""Random calls against the reference: `python -m tests.state --runs 5000 --steps 50 --seed 0 --dtype float64`."""

import argparse
import sys
import time
from collections import Counter
from random import Random

import torch

from lora_plugins import LoraModel
from tests.state.checks import DivergenceError
from tests.state.draw import TYPES, draw_blocks, draw_step
from tests.state.machine import opened
from tests.state.rules import Step
from tests.state.script import script
from tests.state.shrink import Case, replay, shrink, signature
from tests.state.zoo import BLOCKS


class Tally:
    """What happened."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.blocks: Counter[str] = Counter()
        self.found: dict[tuple[str, str], list[Case]] = {}
        self.steps = 0


def walk(
    seed: str,
    dtype: torch.dtype,
    tally: Tally,
    steps: int = 50,
    kind: type[LoraModel] = LoraModel,
    blocks: tuple[str, ...] = (),
) -> None:
    """Makes one run, up to its first divergence.

    Args:
        seed: Decides every call.
        dtype: Type of the model.
        tally: Takes note of what happens.
        steps: Calls at most.
        kind: As in `Machine`.
        blocks: The blocks of the model; by default some at random.
    """
    random = Random(seed)
    blocks, weights = blocks or draw_blocks(random), random.randrange(1000)
    tally.blocks.update(blocks)
    done: list[Step] = []
    try:
        with opened(blocks, dtype, weights, kind) as machine:
            while len(done) < steps:
                step = draw_step(random, machine)
                done.append(step)
                tally.steps += 1
                tally.calls[step.kind, machine.do(step)] += 1
    except DivergenceError as divergence:
        case = Case(blocks, dtype, weights, tuple(done))
        tally.found.setdefault(signature(done[-1], divergence), []).append(case)


def report(tally: Tally, shrinking: bool) -> None:
    """Prints what happened, and the smallest script for each kind of divergence."""
    print(f"{tally.steps} steps")
    kinds = sorted({kind for kind, _ in tally.calls})
    print("calls: " + ", ".join(f"{k} {tally.calls[k, 'done']}+{tally.calls[k, 'refused']} refused" for k in kinds))
    print("blocks: " + ", ".join(f"{name} {count}" for name, count in sorted(tally.blocks.items())))
    print(f"{sum(map(len, tally.found.values()))} divergences of {len(tally.found)} kinds")
    for wanted, cases in sorted(tally.found.items(), key=lambda item: -len(item[1])):
        case = min(cases, key=lambda case: len(case.steps))
        case = shrink(case, wanted) if shrinking else case
        found = replay(case)
        print(f"\n--- {len(cases)} times: {wanted[0]}: {wanted[1]}")
        print(script(case, *found) if found else f"does not show again: {case}")


def main(arguments: list[str] | None = None) -> int:
    """Makes the runs; returns 1 if there was a divergence."""
    parser = argparse.ArgumentParser(prog="python -m tests.state", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--steps", type=int, default=50, help="calls in each run")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--dtype", nargs="+", choices=TYPES, default=TYPES, help="types, taken in turn")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=[], help="of the model; by default at random")
    parser.add_argument("--no-shrink", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tally, started, worked = Tally(), time.perf_counter(), time.process_time()
    for run in range(given.first, given.first + given.runs):
        dtype = getattr(torch, given.dtype[run % len(given.dtype)])
        try:
            walk(f"{given.seed}.{run}", dtype, tally, given.steps, blocks=tuple(given.blocks))
        except Exception:
            print(f"the judge itself failed in run {run} of seed {given.seed}", file=sys.stderr)
            raise
    wall, cpu = time.perf_counter() - started, time.process_time() - worked
    print(f"{given.runs} runs in {wall:.0f} s, {cpu:.0f} s of one core, types {', '.join(given.dtype)}")
    report(tally, not given.no_shrink)
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
