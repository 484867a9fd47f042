"""The display names of metrics, and how their numbers are written."""

from collections.abc import Mapping
from dataclasses import dataclass

BLANK = "-"
TINY = 1e-4


@dataclass(frozen=True)
class MetricKind:
    """How a metric is shown.

    Attributes:
        label: Its name for people.
        is_share: Whether it is a share from 0 to 1, written in percent.
        lower_is_better: Whether a smaller value is a better one.
    """

    label: str
    is_share: bool = False
    lower_is_better: bool = False

    def written(self, value: float | None) -> str:
        """A value as text."""
        if value is None:
            return BLANK
        if self.is_share:
            return f"{100 * value:.1f}%"
        return f"{value:#.3g}".rstrip(".") if abs(value) >= TINY else f"{value:.1g}"

    def change(self, before: float | None, after: float | None) -> str:
        """The change from a value to another, with its sign; shares change by points of a percent."""
        if before is None or after is None:
            return ""
        scale, digits, unit = (100, ".1f", " points") if self.is_share else (1, "#.3g", "")
        return f"{scale * (after - before):+{digits}}".rstrip(".") + unit

    def verdict(self, before: float | None, after: float | None) -> str:
        """`better`, `worse`, or nothing where there is no difference."""
        if before is None or after is None or before == after:
            return ""
        return "better" if (after > before) != self.lower_is_better else "worse"


KINDS: Mapping[str, MetricKind] = {
    "loss": MetricKind("Loss", lower_is_better=True),
    "accuracy": MetricKind("Accuracy", is_share=True),
    "top5": MetricKind("Top-5 accuracy", is_share=True),
    "f1": MetricKind("F1, mean of classes", is_share=True),
    "auroc": MetricKind("AUROC", is_share=True),
    "calibration_error": MetricKind("Calibration error", is_share=True, lower_is_better=True),
    "mean_iou": MetricKind("Mean IoU", is_share=True),
    "dice": MetricKind("Dice", is_share=True),
    "pixel_accuracy": MetricKind("Pixel accuracy", is_share=True),
    "recall": MetricKind("Recall", is_share=True),
    "iou": MetricKind("IoU", is_share=True),
}
"""By the name under which a task logs it, without its split."""


def kind_of(name: str) -> MetricKind:
    """How a metric is shown; one of a third-party task is written as a number, under its name."""
    return KINDS.get(name) or MetricKind(name.replace("_", " ").capitalize())
