"""A report of a fit: one HTML file with metrics, curves, the plan, costs, and the best and worst examples."""

import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_plugins import ConfigError, LoraModel
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.reporting.figures import (
    as_data_url,
    confusion_figure,
    curves_figure,
    eval_logits,
    examples_figure,
    first_val_loader,
)
from lora_plugins.tasks.reporting.html import Figure, Table, render_page
from lora_plugins.tasks.training import VisionTask

Row = tuple[str, ...]
BLANK = "-"


class HtmlReport(Callback):
    """Writes one self-contained HTML file at the end of a fit, and prints its path.

    It holds the metrics before training (the frozen base with a new head; they need a sanity check over the whole
    split, `num_sanity_val_steps: -1`) and after it; what was adapted; the number of trained parameters; the sizes of
    adapter and model; time and memory; curves; the confusion matrix; and the val samples with the lowest and the
    highest loss.

    Args:
        path: The file to write.
        samples: The number of best, and of worst, samples of the val split to show.
    """

    def __init__(self, path: str, samples: int = 4) -> None:
        if samples < 1:
            raise ConfigError(f"samples is {samples}; a report shows at least one.")
        self.path, self.samples = Path(path), samples
        self._reset()

    def _reset(self) -> None:
        self._history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._before: dict[str, float] = {}
        self._plan: list[Row] = []
        self._summary: list[str] = []
        self._seconds: list[float] = []
        self._trained = self._total = self._epoch = 0
        self._start = self._epoch_start = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a task to report on.

        Raises:
            ConfigError: For another module.
        """
        if stage == "fit" and not isinstance(pl_module, VisionTask):
            raise ConfigError(f"HtmlReport reports on tasks of lora_plugins; {type(pl_module).__name__} is not one.")
        self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the plan: at the end of the fit, adapters may be merged."""
        self._start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for callback in _lora_callbacks(trainer):
            target = pl_module.get_submodule(callback.target or "")
            plan = LoraModel(target).plans[callback.adapter_name]
            self._plan += [tuple(str(cell) for cell in row) for row in plan.rows()]
            self._summary.append(plan.summary())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the trained parameters."""
        parameters = list(cast(VisionTask, pl_module).network.parameters())
        self._total = sum(p.numel() for p in parameters)
        self._trained = sum(p.numel() for p in parameters if p.requires_grad)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the last epoch, which a task logs after its callbacks ran, and start the clock."""
        if self._seconds:
            self._record(trainer, "train/")
        self._epoch, self._epoch_start = trainer.current_epoch, time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time of the epoch, with its validation."""
        self._seconds.append(time.perf_counter() - self._epoch_start)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the last epoch."""
        self._record(trainer, "train/")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics."""
        if trainer.state.fn != "fit":
            return
        if trainer.sanity_checking:
            self._before = _metrics(trainer, "val/")
        else:
            self._record(trainer, "val/")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        if cast(Any, trainer).fast_dev_run:  # an attribute that its types lack
            return
        task = cast(VisionTask, pl_module)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        title = f"{task.model_config.name}: {task.main_metric} {self._last(f'val/{task.main_metric}')}"
        self.path.write_text(
            render_page(title, [*self._tables(trainer), *self._figures(trainer, task)], " ".join(self._summary)),
            encoding="utf-8",
        )
        Console().print(f"Report: [bold]{self.path}[/bold]", soft_wrap=True)

    def _record(self, trainer: Trainer, prefix: str) -> None:
        for name, value in _metrics(trainer, prefix).items():
            self._history[name].append((self._epoch, value))

    def _last(self, name: str) -> str:
        points = self._history.get(name)
        return f"{points[-1][1]:.4f}" if points else BLANK

    def _tables(self, trainer: Trainer) -> list[Table]:
        metrics = [
            (
                name.removeprefix("val/"),
                f"{self._before[name]:.4f}" if name in self._before else BLANK,
                self._last(name),
            )
            for name in self._history
            if name.startswith("val/")
        ]
        tables = [
            Table("Metrics on val", ("metric", "before (frozen base, new head)", "after"), metrics),
            Table("What it took", ("", ""), self._costs(trainer)),
        ]
        if self._plan:
            header = ("layer", "type", "plugin", "rank", "alpha", "parameters")
            tables.append(Table("What was adapted", header[: len(self._plan[0])], self._plan, folded=True))
        return tables

    def _costs(self, trainer: Trainer) -> list[Row]:
        seconds = sorted(self._seconds)
        rows: list[Row] = [
            ("parameters trained", f"{self._trained:,} of {self._total:,} ({self._trained / max(1, self._total):.2%})"),
            ("time of the fit", f"{time.perf_counter() - self._start:.1f} s"),
            ("time of an epoch (median)", f"{seconds[len(seconds) // 2]:.2f} s" if seconds else BLANK),
            ("peak memory of the process", f"{_process_mebibytes():,.0f} MiB"),
        ]
        if torch.cuda.is_available():
            rows.append(("peak memory of the GPU", f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"))
        for callback in _lora_callbacks(trainer):
            files = {**{each.title: each.path for each in callback.adapter_files}, "merged model": callback.export_to}
            rows += [(f"size of the {name}", _size(Path(path))) for name, path in files.items() if path]
        return rows

    def _figures(self, trainer: Trainer, task: VisionTask) -> list[Figure]:
        curves = [
            Figure(f"Curve of {name}", as_data_url(curves_figure(self._history, name)))
            for name in ("loss", task.main_metric)
        ]
        if "val" in task.confusion:
            drawn = as_data_url(confusion_figure(task.confusion["val"], task.class_labels))
            curves.append(Figure("Confusion matrix on val", drawn))
        return [*curves, *self._examples(trainer, task)]

    def _examples(self, trainer: Trainer, task: VisionTask) -> list[Figure]:
        loader = first_val_loader(trainer)
        losses = torch.cat([_losses(task, Batch.read(batch)) for batch in loader])
        order = losses.argsort().tolist()
        chosen = {
            "Best examples (lowest loss)": order[: self.samples],
            "Worst examples (highest loss)": order[::-1][: self.samples],
        }
        figures = []
        for title, indices in chosen.items():
            batch = Batch.read(loader.collate_fn([loader.dataset[i] for i in indices]))
            predicted = eval_logits(task, batch.images).argmax(1)
            figure = examples_figure(task, batch.images, cast(Tensor, batch.targets), predicted)
            figures.append(Figure(title, as_data_url(figure)))
        return figures


def _losses(task: VisionTask, batch: Batch) -> Tensor:
    """Cross entropy of each sample of a batch, (N,), the mean over all labels but `ignore_index`."""
    targets = cast(Tensor, batch.targets).long()
    logits = eval_logits(task, batch.images)
    if targets.ndim > 1 and logits.shape[-2:] != targets.shape[-2:]:
        logits = torch.nn.functional.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
    losses = cross_entropy(logits, targets, ignore_index=task.ignore_index, reduction="none").flatten(1 - targets.ndim)
    counts = (targets != task.ignore_index).flatten(1 - targets.ndim)
    if targets.ndim == 1:
        return losses
    return losses.sum(1) / counts.sum(1).clamp(min=1)


def _lora_callbacks(trainer: Trainer) -> list[LoraCallback]:
    callbacks = cast(Any, trainer).callbacks  # an attribute that its types lack
    return [callback for callback in callbacks if isinstance(callback, LoraCallback)]


def _metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _process_mebibytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _size(path: Path) -> str:
    files = [path] if path.is_file() else list(path.rglob("*"))
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 2**20:.2f} MiB"
