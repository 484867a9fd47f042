"""Makes the table of docs/tasks.md: `python -m benchmarks.tasks DATA [--out FILE]`.

DATA is a folder with `cifar-mini` (`{train,val}/CLASS/*.jpg`) and `camvid-mini` (`{images,masks}/{train,val}/*`). One
thread, three seeds. `--rates` tries a third and three times each rate, with one seed, instead.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.tasks.runs import CASES, Outcome, Way, run
from benchmarks.tasks.weights import write_weights

WAYS = {
    "frozen backbone": Way(0, {"classification": 3e-2, "segmentation": 1e-2}),
    "LoRA, r=2": Way(2, {"classification": 3e-4, "segmentation": 2e-3}),
    "LoRA, r=8": Way(8, {"classification": 3e-4, "segmentation": 2e-3}),
    "LoRA, r=32": Way(32, {"classification": 3e-4, "segmentation": 2e-3}),
    "full fine-tuning": Way(None, {"classification": 3e-3, "segmentation": 2e-3}),
}
SEEDS = (0, 1, 2)
FACTORS = (1 / 3, 1, 3)


def main() -> None:
    """Make all runs, print each, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks")
    parser.add_argument("data", type=Path, help="folder with cifar-mini and camvid-mini")
    parser.add_argument("--out", type=Path, help="a .md file for the table; every run is kept beside it, as .jsonl")
    parser.add_argument("--case", choices=CASES, action="append", help="only this task; may be given twice")
    parser.add_argument("--rates", action="store_true", help="try other rates, with one seed, instead")
    parser.add_argument("--epochs", type=int, help="for how long, if not as the case says")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = write_weights(Path(folder))
        for case, name, seed, way in planned(given.case or list(CASES), given.rates):
            outcome = run(given.data, weights, case, way, seed, given.epochs)
            line = {"case": case, "way": name, "seed": seed, "lr": way.rates[case], **asdict(outcome)}
            print(json.dumps(line), flush=True)
            if given.out and not given.rates:
                outcomes.setdefault((case, name), []).append(outcome)
                with given.out.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                given.out.write_text("\n".join(table(outcomes)) + "\n", encoding="utf-8")


def planned(cases: list[str], rates: bool) -> Iterator[tuple[str, str, int, Way]]:
    """The runs: seed by seed, so that what is there after each seed is a whole table."""
    for seed in SEEDS[:1] if rates else SEEDS:
        for case in cases:
            for name, way in WAYS.items():
                for factor in FACTORS if rates else (1,):
                    yield case, name, seed, replace(way, rates={case: way.rates[case] * factor})


def table(outcomes: dict[tuple[str, str], list[Outcome]]) -> Iterator[str]:
    """The lines of a Markdown table: means over the seeds, with the standard deviation of the metric."""
    yield "| task | trained | metric on val | share trained | s per epoch | peak MiB | MiB saved |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (case, name), found in outcomes.items():
        metrics = [100 * outcome.metric for outcome in found]
        spread = statistics.stdev(metrics) if len(metrics) > 1 else 0.0
        first = found[0]
        yield (
            f"| {case} | {name} | {statistics.mean(metrics):.1f} ± {spread:.1f} "
            f"| {first.trained / first.total:.1%} | {statistics.median(o.seconds for o in found):.1f} "
            f"| {max(o.mebibytes for o in found):.0f} | {first.adapter / 2**20:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
