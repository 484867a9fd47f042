"""What is kept of a run: the numbers of its report, as JSON beside the page."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_plugins.tasks.errors import ReportError

FORMAT, VERSION = "lora_plugins.report", 1
FILE = "report.json"


@dataclass(frozen=True)
class Metric:
    """A metric of the val split before and after training; None if it was not measured, or is not defined."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class ClassResult:
    """One class.

    Attributes:
        name: Its name.
        color: Its color, as `#rrggbb`.
        before: Its IoU (masks) or recall (labels) before training; None if it did not occur or was not measured.
        after: Likewise, after training.
        precision: The share of what is predicted as this class that is of it, after training.
        train: How often the first epoch had it, in images or pixels; None if that was not counted.
        val: How often the val split has it.
    """

    name: str
    color: str
    before: float | None
    after: float | None
    precision: float | None
    train: int | None
    val: int


@dataclass(frozen=True)
class PlanRow:
    """A group of adapted layers: their names in one, how many, class, plugin, rank, alpha, parameters of A and B.

    `share` is that of the parameters in the number of elements of their weights.
    """

    name: str
    count: int
    module_class: str
    plugin: str
    rank: int
    alpha: float
    parameters: int
    share: float


@dataclass(frozen=True)
class Costs:
    """What the run took.

    Attributes:
        trained: Trained parameters.
        total: All parameters of the network, with those of adapters.
        seconds: Time of the fit.
        epoch_seconds: Time of an epoch with its validation, the median.
        process_mib: Peak memory of the process; None where the system does not tell it.
        gpu_mib: Peak memory allocated on the GPU.
        sizes: Bytes of the files that the fit wrote, by what they are.
    """

    trained: int
    total: int
    seconds: float
    epoch_seconds: float | None
    process_mib: float | None
    gpu_mib: float | None
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        model: The network.
        data: The data.
        method: How it was fine-tuned: `LoRA, r=8`.
        date: When it ended, `YYYY-MM-DD HH:MM`.
        per_pixel: Whether it predicts masks.
        main_metric: The metric that matters, a key of `metrics`.
        metrics: Metrics of the val split, by name.
        class_metric: What `before` and `after` of the classes are: `iou` or `recall`.
        classes: The classes.
        confusion: The confusion matrix of the val split after training, (true, predicted); empty for many classes.
        confused: The classes that are confused most: true, predicted, how often.
        history: Epochs done and value, by full name, such as `val/loss`; val metrics before training are at 0.
        costs: What it took.
        plan: What was adapted.
        trained: How many tensors were trained in full, by what they belong to.
        facts: Further facts, in groups.
        next_steps: Commands to go on with, by what they do.
    """

    model: str
    data: str
    method: str
    date: str
    per_pixel: bool
    main_metric: str
    metrics: Mapping[str, Metric]
    class_metric: str
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]
    confused: tuple[tuple[int, int, int], ...]
    history: Mapping[str, tuple[tuple[float, float | None], ...]]
    costs: Costs
    plan: tuple[PlanRow, ...]
    trained: Mapping[str, int]
    facts: Mapping[str, Mapping[str, str]]
    next_steps: Mapping[str, str]


def run_as_json(run: RunRecord) -> str:
    """A run as JSON."""
    return json.dumps({"format": FORMAT, "version": VERSION, **_finite(asdict(run))}, ensure_ascii=False)


def read_run(path: str | Path) -> RunRecord:
    """Reads a run from the folder that its report is in, its HTML file, or the JSON file beside that.

    Raises:
        ReportError: If there is no report, or the file is none.
    """
    file = report_file(path)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(
            f"There is no report in {path}: {file} does not exist. A run with the callback HtmlReport writes it; name "
            "the folder that report.html is in, or the file."
        ) from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} cannot be read: {error}") from error
    return _checked(stored, file)


def as_stored(run: RunRecord) -> RunRecord:
    """A run as it is read again: numbers that are not finite are None."""
    return _run(json.loads(run_as_json(run)))


def _checked(stored: Any, file: Path) -> RunRecord:
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ReportError(f"{file} is no report of lora_plugins. Name the folder that report.html is in.")
    if stored.get("version") != VERSION:
        raise ReportError(
            f"{file} is of version {stored.get('version')} of the format of reports; this lora_plugins reads {VERSION}."
        )
    try:
        return _run(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def report_file(path: str | Path) -> Path:
    """The JSON file of a run that is named by its folder, its HTML file or that file itself."""
    path = Path(path)
    if path.is_dir():
        return path / FILE
    return path.with_suffix(".json") if path.suffix.lower() in (".html", ".htm") else path


def _run(stored: Mapping[str, Any]) -> RunRecord:
    values = {key: value for key, value in stored.items() if key not in ("format", "version")}
    if values["main_metric"] not in values["metrics"]:
        raise KeyError(values["main_metric"])
    parts = {
        "metrics": {name: Metric(**metric) for name, metric in values["metrics"].items()},
        "classes": tuple(ClassResult(**result) for result in values["classes"]),
        "confusion": tuple(tuple(row) for row in values["confusion"]),
        "confused": tuple((true, guess, count) for true, guess, count in values["confused"]),
        "history": {name: tuple((at, value) for at, value in points) for name, points in values["history"].items()},
        "costs": Costs(**values["costs"]),
        "plan": tuple(PlanRow(**row) for row in values["plan"]),
    }
    return RunRecord(**{**values, **parts})


def _finite(value: Any) -> Any:
    """A value without nan and infinities, which JSON does not have: they become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
