"""Random fits beside plain ones: `python -m tests.fits --runs 1000 --seed 0`."""

import argparse
import sys
import time
import warnings
from collections import Counter

import torch

from tests.fits.compare import DEFECTS, judge
from tests.fits.draw import draw_fit
from tests.fits.shrink import shrink


def main(arguments: list[str] | None = None) -> int:
    """Makes the runs; returns 1 if the two sides differed in one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fits", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--no-shrink", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the settings are made at random, and Lightning advises against many
    counts: Counter[str] = Counter()
    started, worked = time.perf_counter(), time.process_time()
    for run in range(given.first, given.first + given.runs):
        fit = draw_fit(f"{given.seed}.{run}")
        verdict = judge(fit)
        counts[verdict.kind] += 1
        if verdict.kind in DEFECTS:
            print(f"--- {verdict.kind}: {verdict.detail}\n{fit}")
            print(f"again: python -m tests.fits --seed {given.seed} --first {run} --runs 1", flush=True)
            if not given.no_shrink:
                print(f"smallest that does so: {shrink(fit, verdict.kind)}", flush=True)
    wall, cpu = time.perf_counter() - started, time.process_time() - worked
    print(f"{given.runs} runs in {wall:.0f} s, {cpu:.0f} s of one core")
    print(", ".join(f"{kind} {count}" for kind, count in counts.most_common()))
    return 1 if any(counts[kind] for kind in DEFECTS) else 0


if __name__ == "__main__":
    sys.exit(main())
