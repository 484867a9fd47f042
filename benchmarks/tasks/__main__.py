"""Makes the table of docs/real_pictures.md: `python -m benchmarks.tasks DATA [--out FILE]`.

DATA is a folder with `cifar-mini` (`{train,val}/CLASS/*.jpg`) and `camvid-mini` (`{images,masks}/{train,val}/*`). One
thread, three seeds. `--rates` tries a third and three times each rate instead, on the train split alone: one half is
validated by the other, with a seed that the table does not have.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from benchmarks.tasks.halves import write_halves
from benchmarks.tasks.runs import CASES, Method, Outcome, Tuning, run
from lora_plugins.tasks.autoconfig.found import LABELS, MASKS
from lora_plugins.tasks.autoconfig.recommended import AUTO, RECIPES

FROZEN, FULL = "frozen backbone", "full fine-tuning"
LABELED, U_NET, MLP = PICTURES = ("classification", "segmentation", "segmentation, MLP decoder")
DIGITS, SCENES = "digits", "scenes of digits"
LORA = {
    LABELED: Tuning(3e-3, 1e-3),
    U_NET: Tuning(1e-2, 3e-3, "track"),
    MLP: Tuning(1e-2, 3e-3, "track"),
}
EVERYWHERE = {case: replace(tuning, everywhere=True) for case, tuning in LORA.items()}
METHODS = {
    FROZEN: Method(0, {LABELED: Tuning(3e-3), U_NET: Tuning(1e-2, norm="track"), MLP: Tuning(1e-2, norm="track")}),
    "LoRA, r=2": Method(2, LORA),
    "LoRA, r=8": Method(8, LORA),
    "LoRA, r=32": Method(32, LORA),
    "LoRA, r=8, every layer": Method(8, EVERYWHERE),
    FULL: Method(
        None,
        {
            LABELED: Tuning(3e-3, 1e-4),
            U_NET: Tuning(1e-2, 5e-4, "track"),
            MLP: Tuning(1e-2, 5e-4, "track"),
            DIGITS: Tuning(1e-3, 1e-3, "track"),
            SCENES: Tuning(2e-3, 2e-3, "track"),
        },
    ),
}
STORED = {
    f"LoRA, r=8, {base}": Method(8, {case: replace(tuning, **fields) for case, tuning in LORA.items()})
    for base, fields in {
        "nf4": {"quantize": "nf4"},
        "nf4 with LoftQ": {"quantize": "nf4", "init": "loftq"},
        "int8": {"quantize": "int8"},
    }.items()
}
"""The same on a base that is stored in fewer bytes, for docs/howto/quantize.md."""


def _recommended(task: str) -> Tuning:
    """What `train DATA` takes for a task."""
    recipe = RECIPES[AUTO][task]
    return Tuning(
        recipe.lr * recipe.heads_lr_ratio,
        recipe.lr,
        recipe.lora.get("norm", "freeze"),
        everywhere=recipe.lora.get("target_modules") == "all",
        loraplus=recipe.loraplus_lr_ratio,
    )


RECOMMENDED = {
    "LoRA, as recommended": Method(
        8,
        {
            LABELED: _recommended(LABELS),
            MLP: _recommended(MASKS),
            DIGITS: _recommended(LABELS),
            SCENES: _recommended(MASKS),
        },
    )
}
"""What docs/settings.md compares with full fine-tuning."""

ALL = METHODS | STORED | RECOMMENDED


@dataclass(frozen=True)
class Comparison:
    """What is run if no method or task is named; `epochs` is None for as long as the task says."""

    methods: tuple[str, ...]
    cases: tuple[str, ...] = PICTURES
    epochs: int | None = None


OF_METHODS = Comparison(tuple(METHODS))
OF_STORED = Comparison(("LoRA, r=8", *STORED))
OF_RECOMMENDED = Comparison(
    (*RECOMMENDED, FULL), tuple(RECOMMENDED["LoRA, as recommended"].tuning), RECIPES[AUTO][LABELS].epochs
)

SEEDS = (0, 1, 2)
RATES_SEED = 100
FACTORS = (1 / 3, 1, 3)


def main() -> None:
    """Makes all runs, prints each, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks")
    parser.add_argument("data", type=Path, help="folder with cifar-mini and camvid-mini")
    parser.add_argument("--out", type=Path, help="a .md file for the table; runs are kept in the .jsonl beside it")
    parser.add_argument("--case", choices=CASES, action="append", help="only this task; may be given twice")
    parser.add_argument("--method", choices=ALL, action="append", help="only this method; may be given again")
    parser.add_argument("--seed", type=int, action="append", help=f"by default {SEEDS}; may be given again")
    for flag, comparison, summary in (
        ("--stored", OF_STORED, "LoRA on stored bases, beside LoRA on the float one"),
        ("--recommended", OF_RECOMMENDED, "the settings of `train` and full fine-tuning, on digits as well"),
    ):
        parser.add_argument(flag, dest="comparison", action="store_const", const=comparison, help=summary)
    parser.set_defaults(comparison=OF_METHODS)
    parser.add_argument("--rates", action="store_true", help="try other rates on halves of the train split instead")
    parser.add_argument("--epochs", type=int, help="for how long, if not as the case says")
    given = parser.parse_args()
    if given.rates and (others := [case for case in given.case or () if case not in PICTURES]):
        parser.error(f"--rates halves the pictures of DATA, which {others[0]!r} is not made of")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if not given.rates:
        _fill_table(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        _try_rates(write_halves(given.data, Path(folder)), given.case or PICTURES, given.epochs)


def _try_rates(halves: list[Path], cases: Sequence[str], epochs: int | None) -> None:
    for case, name, method in tried(cases):
        metrics = [run(half, case, method, RATES_SEED, epochs).metric for half in halves]
        line = {"case": case, "method": name, **asdict(method.tuning[case]), "metric": statistics.mean(metrics)}
        print(json.dumps(line), flush=True)


def _fill_table(given: argparse.Namespace) -> None:
    runs = given.out and given.out.with_suffix(".jsonl")
    comparison: Comparison = given.comparison
    wanted, epochs = given.method or comparison.methods, given.epochs or comparison.epochs
    for case, name, seed, method in planned(given.case or comparison.cases, ALL, given.seed or SEEDS):
        if name not in wanted or (runs and (case, name, seed) in recorded_runs(runs)):
            continue
        outcome = run(given.data, case, method, seed, epochs)
        line = {"case": case, "method": name, "seed": seed, **asdict(method.tuning[case]), **asdict(outcome)}
        print(json.dumps(line), flush=True)
        if runs:
            with runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            found = recorded_outcomes(runs)
            given.out.write_text("\n".join([*table(found), "", *differences(found)]) + "\n", encoding="utf-8")


def planned(
    cases: Sequence[str], methods: Mapping[str, Method] = METHODS, seeds: Sequence[int] = SEEDS
) -> Iterator[tuple[str, str, int, Method]]:
    """The runs: seed by seed, so that what is there after each seed is a whole table."""
    for seed in seeds:
        for case in cases:
            for name, method in methods.items():
                if case in method.tuning:
                    yield case, name, seed, method


def tried(cases: Sequence[str]) -> Iterator[tuple[str, str, Method]]:
    """The settings that are tried, as many for each method."""
    for case in cases:
        for name, method in METHODS.items():
            for factor in FACTORS:
                yield case, name, replace(method, tuning={case: _scaled(method.tuning[case], factor)})


def _scaled(tuning: Tuning, factor: float) -> Tuning:
    """Another rate for the pretrained weights or their adapters, or for the head where it is all there is."""
    return replace(tuning, lr=tuning.lr * factor) if tuning.lr else replace(tuning, head_lr=tuning.head_lr * factor)


def recorded_runs(runs: Path) -> set[tuple[str, str, int]]:
    """The runs in a file; they are not run again, so that an interrupted benchmark resumes."""
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
    return {(line["case"], line["method"], line["seed"]) for line in map(json.loads, lines)}


def recorded_outcomes(runs: Path) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes in a file of runs, by task and method."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {(case, method): [] for case in CASES for method in ALL}
    for line in map(json.loads, runs.read_text(encoding="utf-8").splitlines()):
        outcome = Outcome(**{field.name: line[field.name] for field in fields(Outcome)})
        outcomes[line["case"], line["method"]].append(outcome)
    return {key: found for key, found in outcomes.items() if found}


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


def differences(outcomes: dict[tuple[str, str], list[Outcome]]) -> Iterator[str]:
    """The lines of a table of paired differences: means over the seeds, with the standard error of the mean."""
    yield "| task | trained | above the frozen backbone | above full fine-tuning |"
    yield "| --- | --- | --- | --- |"
    for (case, name), found in outcomes.items():
        against = [outcomes.get((case, other), []) for other in (FROZEN, FULL)]
        cells = [_paired(found, others) for others in against]
        yield f"| {case} | {name} | {' | '.join(cells)} |"


def _paired(ones: list[Outcome], others: list[Outcome]) -> str:
    """The mean difference over the seeds that both have."""
    metrics = {other.seed: other.metric for other in others}
    gaps = [100 * (one.metric - metrics[one.seed]) for one in ones if one.seed in metrics]
    if ones is others or len(gaps) < 2:
        return ""
    return f"{statistics.mean(gaps):+.1f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}"


if __name__ == "__main__":
    sys.exit(main())
