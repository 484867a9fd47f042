"""Which of the metrics that a module logs is the main one."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lora_plugins.integrations.lightning.shims import callbacks_of


def shown_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns what the module logs for the progress bar, or else all that it logs, the main metric first.

    The main one is what a ModelCheckpoint or EarlyStopping monitors. Without that, metrics of the val split come before
    those of the train split, and in each split the loss comes last.
    """
    metrics: Mapping[str, Any] = trainer.progress_bar_metrics or trainer.callback_metrics
    monitored = {getattr(callback, "monitor", None) for callback in callbacks_of(trainer)}
    found = {name: float(value) for name, value in metrics.items()}

    def order(name: str) -> tuple[bool, bool, bool]:
        return name not in monitored, not name.startswith("val"), "loss" in name

    return {name: found[name] for name in sorted(found, key=order)}


def as_text(name: str, value: float) -> str:
    """Returns a metric as it is shown, with three significant digits."""
    return f"{name} {value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{name} {value:.2e}"
