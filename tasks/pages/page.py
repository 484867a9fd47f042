"""The pages, from templates: the report of a run, and several runs side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_plugins.tasks.pages.metric_kinds import BLANK, kind_of
from lora_plugins.tasks.pages.run_record import ClassResult, RunRecord

if TYPE_CHECKING:
    from lora_plugins.plan import LayerGroup

TEMPLATES = Path(__file__).parent / "templates"
MOST_NUMBERED = 25
"""A confusion matrix of more classes has no numbers in its cells."""

COLORS = 7
"""How many colors the style has for lines."""

SETTINGS = ("Model", "LoRA", "Training", "Data")
"""Groups of facts that are settings."""

Point = tuple[float, float | None]
"""Epochs done, and the value of a metric then."""

Chart = Mapping[str, Any]
"""Its title, how its numbers are written, and its lines: name, number of a color, points."""


@dataclass(frozen=True)
class Example:
    """A sample of the val split with what was predicted for it.

    Attributes:
        name: Its name.
        image: The image, as a `data:` URL.
        width: Its width in pixels.
        height: Its height in pixels.
        loss: Its loss.
        classes: The classes that it shows, and those that were predicted.
        truth: The true mask in colors, transparent where nothing is to be seen, as a `data:` URL; None for labels.
        prediction: The predicted mask, likewise.
        score: Its own mean IoU; None for labels.
        true_class: Its label; None for masks, and for a label that is ignored.
        ranking: The most probable classes with their probabilities, best first; empty for masks.
    """

    name: str
    image: str
    width: int
    height: int
    loss: float
    classes: tuple[int, ...]
    truth: str | None = None
    prediction: str | None = None
    score: float | None = None
    true_class: int | None = None
    ranking: tuple[tuple[int, float], ...] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether another label was predicted; masks are never just right or wrong."""
        return bool(self.ranking) and self.true_class is not None and self.ranking[0][0] != self.true_class


def render_report(run: RunRecord, examples: Sequence[Example], void: str | None = None) -> str:
    """The report of a run, with samples to show, worst first, and the color of ignored pixels, if there are some."""
    shown = [name for name in ("loss", run.main_metric) if _lines(run, name)]
    return _render(
        "report.html",
        run=run,
        examples=examples,
        void=void,
        charts=[_chart(name, _lines(run, name)) for name in shown],
        best=_extremes(run.classes),
        cards=[name for name in ("loss", "f1", "pixel_accuracy") if name in run.metrics][:2],
        numbered=len(run.classes) <= MOST_NUMBERED,
    )


def render_comparison(runs: Mapping[str, RunRecord], notes: Sequence[str] = ()) -> str:
    """Several runs of one task side by side, with notes on what keeps them from being comparable."""
    first = next(iter(runs.values()))
    name = first.main_metric
    lines = [
        {"name": label, "color": number % COLORS, "dashed": number >= COLORS, "points": points}
        for number, (label, run) in enumerate(runs.items())
        if (points := _points(run, f"val/{name}"))
    ]
    # Reversed: of classes with one name, the first has the samples of a list.
    after = [{result.name: result.after for result in reversed(run.classes)} for run in runs.values()]
    values = [metric.after for run in runs.values() if (metric := run.metrics.get(name)) and metric.after is not None]
    return _render(
        "comparison.html",
        runs=runs,
        first=first,
        notes=notes,
        charts=[_chart(name, lines)] if lines else [],
        classes=[(result.name, [found.get(result.name) for found in after]) for result in first.classes],
        top=max(values, default=None),
        colors=COLORS,
        settings=_differing(list(runs.values())),
    )


@dataclass(frozen=True)
class SampleRecord:
    """A run that taught a model to draw.

    Attributes:
        model: Its name.
        summary: What was adapted, in a sentence.
        facts: What the run took, by label.
        plan: The adapted layers in groups.
        losses: Points (epochs done, value) of each loss, by name.
        sheets: Pictures of samples, by title, as `data:` URLs.
    """

    model: str
    summary: str
    facts: Mapping[str, str]
    plan: "Sequence[LayerGroup]"
    losses: Mapping[str, Sequence[tuple[float, float]]]
    sheets: Mapping[str, str]


def render_samples(run: SampleRecord) -> str:
    """The report of a run that taught a model to draw."""
    charts = [
        _chart(name, [{"name": "train", "color": 1, "dashed": False, "points": points}])
        for name, found in run.losses.items()
        if (points := _drawn(found))
    ]
    return _render("samples.html", run=run, charts=charts)


def _differing(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The settings, by group and label, in which runs differ."""
    entries = dict.fromkeys((group, label) for run in runs for group in SETTINGS for label in run.facts.get(group, {}))
    return [
        (group, label) for group, label in entries if len({run.facts.get(group, {}).get(label) for run in runs}) > 1
    ]


def _lines(run: RunRecord, name: str) -> list[dict[str, Any]]:
    """The lines of a metric, train and val."""
    return [
        {"name": split, "color": color, "dashed": False, "points": points}
        for color, split in enumerate(("val", "train"))
        if (points := _points(run, f"{split}/{name}"))
    ]


def _points(run: RunRecord, name: str) -> Sequence[Point]:
    return _drawn(run.history.get(name, ()))


def _drawn(points: Sequence[Point]) -> Sequence[Point]:
    """What a chart shows of a metric, None for what is no finite number; nothing where no value is one."""
    finite = [(at, value if value is not None and math.isfinite(value) else None) for at, value in points]
    return finite if any(value is not None for _, value in finite) else ()


def _chart(name: str, lines: Sequence[Mapping[str, Any]]) -> Chart:
    kind = kind_of(name)
    return {"title": kind.label, "share": kind.is_share, "lines": lines}


def _extremes(classes: Sequence[ClassResult]) -> tuple[ClassResult, ClassResult] | None:
    """The best and the worst class."""
    known = sorted((result for result in classes if result.after is not None), key=lambda result: result.after or 0.0)
    return (known[-1], known[0]) if len(known) > 1 else None


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(kind_of=kind_of, BLANK=BLANK)
    environment.filters.update(count=_count, size=_size, duration=_duration, percent=_percent)
    return environment.get_template(template).render(**values)


def _count(number: int | None) -> str:
    """A number with separators."""
    return BLANK if number is None else f"{number:,}"


def _percent(share: float | None) -> str:
    """A share in percent, with two significant digits below ten percent."""
    if share is None:
        return BLANK
    return f"{100 * share:.1f}%" if share >= 0.1 or share == 0 else f"{100 * share:#.2g}%"


def _size(number: float) -> str:
    """Bytes."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def _duration(seconds: float | None) -> str:
    """A time, in convenient units."""
    if seconds is None:
        return BLANK
    if seconds < 60:
        return f"{seconds:#.3g}".rstrip(".") + " s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
