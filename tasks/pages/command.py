"""The command `report`: `lora-plugins report compare RUN RUN ... --out FILE`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_plugins.cli import Parser
from lora_plugins.integrations.lightning.cli import place
from lora_plugins.tasks.errors import ReportError
from lora_plugins.tasks.pages.metric_kinds import kind_of
from lora_plugins.tasks.pages.page import render_comparison
from lora_plugins.tasks.pages.run_record import RunRecord, read_run, report_file
from lora_plugins.writable import check_writable_file


def report_main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ReportError: If a report is missing or damaged, or the runs are of different tasks.
        ConfigError: If the page cannot be written.
    """
    parser = Parser(prog="lora-plugins report", description="Work with the reports of runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser("compare", help="put runs side by side", description="Put runs side by side.")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="the folder with a run's report, or its file")
    page = "the page to write (%(default)s)"
    compare.add_argument("--out", type=place, default="comparison.html", metavar="FILE", help=page)
    options = parser.parse_args(arguments)
    return _compare(options.runs, options.out)


def _compare(paths: Sequence[str], out: Path) -> int:
    distinct = {report_file(path).resolve(): str(Path(path)) for path in reversed(paths)}
    if len(distinct) < 2:
        raise ReportError(f"{paths[0]} is one run. Name two or more to compare.")
    if out.resolve().with_suffix(".json") in distinct:
        raise ReportError(f"--out {out} is a report that is compared, and would be replaced. Name another file.")
    found = {path: read_run(path) for path in reversed(distinct.values())}
    _check_alike(found)
    runs = _labeled(found)
    notes = _differences(runs)
    _write(out, render_comparison(runs, notes))
    width = max(map(len, runs))
    for label, run in runs.items():
        metric, costs = run.metrics[run.main_metric], run.costs
        kind = kind_of(run.main_metric)
        trained = f"{costs.trained:,} trained ({costs.trained / max(1, costs.total):.1%})"
        print(f"{label:{width}}  {kind.label} {kind.written(metric.after)}, {trained}")
    for note in notes:
        print(f"note: {note}")
    print(f"Comparison: {out}")
    return 0


def _write(out: Path, text: str) -> None:
    from lora_plugins.utils import replace_file  # brings torch along

    check_writable_file(out, "--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, text.encode())


def _check_alike(found: Mapping[str, RunRecord]) -> None:
    (first_path, first), *others = found.items()
    for path, run in others:
        if run.main_metric != first.main_metric:
            raise ReportError(
                f"{first_path} is measured by {first.main_metric}, {path} by {run.main_metric}: runs of different "
                "tasks are not comparable."
            )


def _labeled(found: Mapping[str, RunRecord]) -> dict[str, RunRecord]:
    """The runs by their method, and their path where a method occurs twice."""
    methods = Counter(run.method for run in found.values())
    return {run.method if methods[run.method] == 1 else f"{run.method} ({path})": run for path, run in found.items()}


def _differences(runs: Mapping[str, RunRecord]) -> list[str]:
    """What keeps runs from being comparable, as sentences."""
    sides: Mapping[str, set[Any]] = {
        "classes": {tuple(result.name for result in run.classes) for run in runs.values()},
        "numbers of val labels": {tuple(result.val for result in run.classes) for run in runs.values()},
        "networks": {run.model for run in runs.values()},
        "data": {run.data for run in runs.values()},
        "numbers of epochs": {run.facts.get("Training", {}).get("epochs") for run in runs.values()},
    }
    return [f"The runs have different {what}." for what, found in sides.items() if len(found) > 1]
