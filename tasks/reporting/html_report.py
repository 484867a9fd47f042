"""A report of a fit: one HTML file to read and to show, and its numbers as JSON beside it."""

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lora_plugins import ConfigError, LoraModel, Plan
from lora_plugins.field_checks import check_count
from lora_plugins.integrations.lightning.adapter_files import titles
from lora_plugins.integrations.lightning.callback import LoraCallback, lora_callbacks
from lora_plugins.integrations.lightning.console import tell_written
from lora_plugins.integrations.lightning.writer import check_by_writer, writes_files
from lora_plugins.plan import parameter_counts
from lora_plugins.tasks.argument_checks import check_path
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.pages import Costs, Metric, PlanRow, RunRecord, as_stored, render_report, run_as_json
from lora_plugins.tasks.reporting.class_results import class_results, most_confused
from lora_plugins.tasks.reporting.run_facts import (
    Facts,
    data_facts,
    data_name,
    environment_facts,
    lora_facts,
    method_of,
    model_facts,
    training_facts,
)
from lora_plugins.tasks.reporting.sample_choice import Judged, choose, example, judge, on_device_of
from lora_plugins.tasks.reporting.val_loaders import first_val_loader, has_places, has_validated
from lora_plugins.tasks.segmentation import IGNORED
from lora_plugins.tasks.training import VisionTask, next_steps
from lora_plugins.utils import replace_files
from lora_plugins.writable import check_writable_file, from_home

VAL = "val/"
MOST_CELLS = 64
"""A confusion matrix of more classes is not stored."""

MEBIBYTE = 2**20

Point = tuple[float, float]
"""Epochs done, and the value of a metric then."""


class HtmlReport(Callback):
    """Writes one self-contained HTML file at the end of a fit, and prints its path.

    It holds the metrics before training (the frozen base with a new head, or what a run is resumed with; they need a
    sanity check over the whole split, `num_sanity_val_steps: -1`) and after it, for all classes and for each; curves;
    the confusion matrix; samples of the val split, worst first, unless it is a stream; what was adapted; what it took;
    how the run was made, and how to go on. A JSON file of the same name has the numbers, for
    `lora-plugins report compare`.

    Classes and samples are judged anew with the weights that the fit leaves, on the device that it ran on. The metrics
    are those of its last validation, or that of the best weights where these are left; where steps follow it, the page
    and a warning say so. Weights that this fit has not validated, as those of the run that it resumed, have none.

    Args:
        path: The file to write.
        samples: The number of worst, and of best, samples of the val split to show. Others are added so that each class
            is shown.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(self, path: str, samples: int = 8) -> None:
        check_path("path", path)
        check_count("samples", samples)
        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"path is {path!r}. A report is an HTML file: name one that ends in .html.")
        self.path, self.samples = Path(from_home(path)), samples
        self._reset()

    def _reset(self) -> None:
        self._history: dict[str, list[Point]] = defaultdict(list)
        self._before: dict[str, float] = {}
        self._confusion_before: Tensor | None = None
        self._counts: Tensor | None = None
        self._plans: list[Plan] = []
        self._training: Facts = {}
        self._method = ""
        self._seconds: list[float] = []
        self._trained = self._total = self._epoch = self._batches = self._measured_at = 0
        self._first_epoch = self._first_step = 0
        self._start = self._epoch_start = self._took = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is a task to report on, and a place to write to.

        Raises:
            ConfigError: For another module, or a path that cannot be written.
        """
        if stage == "fit" and not isinstance(pl_module, VisionTask):
            raise ConfigError(f"HtmlReport reports on tasks of lora_plugins; {type(pl_module).__name__} is not one.")
        if stage == "fit":
            check_by_writer(trainer, lambda: check_writable_file(self.path, "path of HtmlReport"))
        self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the plan: at the end of the fit, adapters may be merged."""
        self._start = time.perf_counter()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for callback in lora_callbacks(trainer):
            target = pl_module.get_submodule(callback.target or "")
            self._plans.append(LoraModel(target).plans[callback.adapter_name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records what is trained, and how."""
        task = cast(VisionTask, pl_module)
        self._trained, self._total = parameter_counts(task.network)
        self._training, self._method = training_facts(trainer, task), method_of(task, self._plans)
        self._first_epoch, self._first_step = trainer.current_epoch, trainer.global_step
        self._counts = torch.zeros(task.model_config.num_classes, dtype=torch.long)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the metrics of the last epoch, which a task logs after its callbacks ran, and starts the clock."""
        if self._seconds:
            self._record(trainer, "train/", self._epoch + 1)
        self._epoch, self._batches, self._epoch_start = trainer.current_epoch, 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the labels of the first epoch."""
        self._batches = batch_idx + 1
        targets = Batch.read(batch).targets
        if self._counts is not None and not self._seconds and targets is not None:
            counted = targets[targets != cast(VisionTask, pl_module).ignore_index]
            self._counts += torch.bincount(counted.flatten(), minlength=len(self._counts)).cpu()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the time of the epoch, with its validation, and the labels that all processes saw in the first."""
        if self._counts is not None and not self._seconds:
            self._counts = trainer.strategy.reduce(self._counts.to(pl_module.device), reduce_op="sum").cpu()
        self._seconds.append(time.perf_counter() - self._epoch_start)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the metrics of the last epoch."""
        self._record(trainer, "train/", self._epoch + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the metrics; those before training only if they are of the whole split."""
        if trainer.state.fn != "fit":
            return
        if not trainer.sanity_checking:
            self._measured_at = trainer.global_step
            self._record(trainer, VAL, self._epoch + self._share_of_epoch(trainer))
        elif list(trainer.num_sanity_val_batches) == list(trainer.num_val_batches):
            metrics = trainer.callback_metrics
            self._before = {name: float(value) for name, value in metrics.items() if name.startswith(VAL)}
            self._confusion_before = cast(VisionTask, pl_module).confusion.get("val")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._took = time.perf_counter() - self._start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the page and its numbers.

        Every callback has ended the fit by now, whatever their order: weights and files are those that it leaves.
        """
        if stage != "fit" or not writes_files(trainer) or not has_validated(trainer, "report"):
            return
        if self._is_behind(trainer):
            rank_zero_warn(
                f"The metrics in the report are of step {self._measured_at:,}, the last that was validated, and "
                f"training went on to step {trainer.global_step:,}; what it says of classes and samples is of the "
                "weights that are left. See check_val_every_n_epoch, val_check_interval and max_steps."
            )
        epoch = _epoch_left(trainer, lora_callbacks(trainer), self._history)
        if epoch is not None and math.isnan(epoch):
            rank_zero_warn(
                "The report has no metrics after training: the best weights, which are left, are not those of a "
                "validation of this fit, but of the run that it resumed, or its ModelCheckpoint monitors no metric of "
                "the task. `validate` measures them."
            )
        task, loader = cast(VisionTask, pl_module), first_val_loader(trainer)
        with on_device_of(trainer, task):
            judged = judge(task, loader)
            chosen = choose(judged, self.samples) if has_places(loader) else []
            examples = [example(task, loader, index, judged) for index in chosen]
        run = as_stored(self._run(trainer, task, judged, epoch))
        void = f"#{bytes(IGNORED).hex()}" if judged.has_ignored else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        page, numbers = render_report(run, examples, void).encode(), run_as_json(run).encode()
        replace_files({self.path: page, self.path.with_suffix(".json"): numbers})
        tell_written(trainer, {"Report": self.path})

    def _is_behind(self, trainer: Trainer) -> bool:
        """Whether the last metrics are of other weights than those that the fit leaves."""
        last = all(callback.merge_source == "last" for callback in lora_callbacks(trainer))
        return last and trainer.global_step > self._measured_at > 0

    def _share_of_epoch(self, trainer: Trainer) -> float:
        """How much of the epoch is done; all of it where the data does not know its length."""
        batches = trainer.num_training_batches
        return 1.0 if math.isinf(batches) else min(1.0, self._batches / max(1, batches))

    def _record(self, trainer: Trainer, prefix: str, at: float) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                self._history[name].append((at, float(value)))

    def _run(self, trainer: Trainer, task: VisionTask, judged: Judged, epoch: float | None) -> RunRecord:
        per_pixel = task.main_metric == "mean_iou"
        data, labels = cast(Any, trainer).datamodule, task.class_labels
        confusion, costs = judged.confusion, self._costs(trainer)
        results = class_results(labels, confusion, self._confusion_before, self._counts, per_pixel=per_pixel)
        return RunRecord(
            model=task.model_config.name,
            data="its data" if data is None else data_name(data),
            method=self._method,
            date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
            per_pixel=per_pixel,
            main_metric=task.main_metric,
            metrics=self._metrics(task.main_metric, epoch),
            class_metric="iou" if per_pixel else "recall",
            classes=results,
            confusion=tuple(map(tuple, confusion.tolist())) if len(labels) <= MOST_CELLS else (),
            confused=most_confused(confusion),
            history=self._curves(),
            costs=costs,
            plan=tuple(row for plan in self._plans for row in _plan_rows(plan)),
            trained={name: count for plan in self._plans for name, count in plan.trained_groups().items()},
            facts=self._facts(trainer, task, costs),
            next_steps=next_steps(trainer, task.model_config),
        )

    def _metrics(self, main: str, epoch: float | None) -> dict[str, Metric]:
        """The val metrics before training and after the given epoch, or else the last; the one that matters first."""
        found = {main: Metric(None, None)}
        for name, points in self._history.items():
            short = name.removeprefix(VAL)
            if name.startswith(VAL) and "/" not in short:
                found[short] = Metric(self._before.get(name), _value_at(epoch, points))
        return found

    def _curves(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """The history of all metrics but those of single classes; what was measured before training comes first."""
        start = {name: [(float(self._first_epoch), value)] for name, value in self._before.items()}
        return {
            name: tuple(start.get(name, []) + points) for name, points in self._history.items() if name.count("/") == 1
        }

    def _costs(self, trainer: Trainer) -> Costs:
        cuda, callbacks = trainer.strategy.root_device.type == "cuda", lora_callbacks(trainer)
        return Costs(
            trained=self._trained,
            total=self._total,
            seconds=self._took,
            epoch_seconds=statistics.median(self._seconds) if self._seconds else None,
            process_mib=_process_mebibytes(),
            gpu_mib=torch.cuda.max_memory_allocated() / MEBIBYTE if cuda else None,
            sizes={what: _bytes(path) for what, path in _files(callbacks).items()},
        )

    def _facts(self, trainer: Trainer, task: VisionTask, costs: Costs) -> dict[str, Facts]:
        peaks = {"peak memory": costs.process_mib, "peak memory of the GPU": costs.gpu_mib}
        memory = {of: f"{peak:,.0f} MiB" for of, peak in peaks.items() if peak is not None}
        files = {what: str(path) for what, path in _files(lora_callbacks(trainer)).items()}
        length = {"epochs": str(self._epoch + 1), "steps": f"{trainer.global_step:,}"}
        if self._first_step:
            length["resumed"] = f"at step {self._first_step:,}"
        if self._is_behind(trainer):
            length["metrics"] = f"of step {self._measured_at:,}"
        groups = {
            "Model": model_facts(task, task.provenance()["image_size"]),
            "LoRA": lora_facts(self._plans),
            "Training": {**length, **self._training},
            "Data": data_facts(trainer),
            "Environment": {**environment_facts(trainer, task), **memory},
            "Files": files,
        }
        return {group: facts for group, facts in groups.items() if facts}


def _epoch_left(trainer: Trainer, callbacks: list[LoraCallback], history: Mapping[str, list[Point]]) -> float | None:
    """The epochs done of the best weights, if the fit leaves them, nan if it has not validated them; None if the last.

    They are those of the first epoch with the best score, as ModelCheckpoint takes no other that is as good.
    """
    if all(callback.merge_source == "last" for callback in callbacks):
        return None
    monitored = next(c for c in cast(Any, trainer).checkpoint_callbacks if getattr(c, "monitor", None))
    if monitored.best_model_score is None:
        return None
    score = float(monitored.best_model_score)
    return next((at for at, value in history.get(monitored.monitor, ()) if value == score), math.nan)


def _value_at(epoch: float | None, points: Sequence[Point]) -> float:
    """The value after so many epochs, nan if there is none; the last for None."""
    return points[-1][1] if epoch is None else dict(points).get(epoch, math.nan)


def _plan_rows(plan: Plan) -> Iterator[PlanRow]:
    for group in plan.groups():
        first = group.layers[0]
        yield PlanRow(
            name=group.name,
            count=len(group.layers),
            module_class=first.module_class,
            plugin=first.plugin.name,
            rank=first.r,
            alpha=first.alpha,
            parameters=group.parameters,
            share=group.share,
        )


def _files(callbacks: list[LoraCallback]) -> dict[str, Path]:
    """The files that callbacks have written, by what they are."""
    adapters = [each for callback in callbacks for each in callback.adapter_files]
    files = {title: Path(each.path) for title, each in zip(titles(adapters), adapters, strict=True)}
    merged = [Path(callback.export_to) for callback in callbacks if callback.export_to]
    return files | {f"merged model{'' if not at else f' {at + 1}'}": path for at, path in enumerate(merged)}


def _process_mebibytes() -> float | None:
    """The peak memory of this process; None on Windows, which does not tell it in this way."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MEBIBYTE if sys.platform == "darwin" else peak / 2**10


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())
