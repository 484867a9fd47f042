"""`FitConsole`: what a run shows on its way, and where everything is when it has ended."""

import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from lora_plugins.integrations.lightning.console.bar import Bar, is_terminal
from lora_plugins.integrations.lightning.console.main_metric import as_text, shown_metrics
from lora_plugins.integrations.lightning.console.plan_table import print_lines
from lora_plugins.integrations.lightning.shims import callbacks_of, carried, carry, starts_by_multiprocessing

_WRITTEN = "written"
"""Under which a process that multiprocessing has started sends what its callbacks have written."""

_STAGES: Mapping[RunningStage, tuple[str, str]] = {
    RunningStage.SANITY_CHECKING: ("Before training", "num_sanity_val_batches"),
    RunningStage.VALIDATING: ("Validating", "num_val_batches"),
    RunningStage.TESTING: ("Testing", "num_test_batches"),
    RunningStage.PREDICTING: ("Predicting", "num_predict_batches"),
}
"""By stage, what is shown, and the attribute of the trainer that says how many batches there are."""

_UNLIMITED = -1
"""`max_epochs` and `max_steps` of a trainer without such a limit."""


class FitConsole(Callback):
    """Shows a run in one line of a terminal: its progress, the time that is left, the main metric.

    Where the output is no terminal, each epoch is a plain line.

    Args:
        shows: Whether it shows anything; if not, it only collects what the run has written.

    Attributes:
        written: The files that callbacks have written, by what they are.
        to_paste: Lines of Python that load them.
    """

    def __init__(self, shows: bool = True) -> None:
        self.shows = shows
        self.written: dict[str, Path] = {}
        self.to_paste: list[str] = []
        self._bar: Bar | None = None
        self._start = 0.0
        self._first = 0.0
        self._epoch = ""
        self._line: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shows nothing from processes other than the first."""
        self.written, self.to_paste, self._line = {}, [], None
        self.shows = self.shows and trainer.is_global_zero

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar."""
        self._show("Before training", 0, _batches(trainer.num_sanity_val_batches), now=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and shows the epoch: a first step may take a minute."""
        self._start, (self._first, _) = time.monotonic(), _progress(trainer)
        self._epoch = _epoch(trainer)
        self._show_training(trainer, now=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the epoch before, whose metrics are complete now."""
        self._end_epoch(trainer)
        self._epoch = _epoch(trainer)
        self._line = f"epoch {self._epoch}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        self._show_training(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves the bar, or says within a fit that it validates."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show_training(trainer, validating=True)
        else:
            assert trainer.state.stage is not None
            text, batches = _STAGES[trainer.state.stage]
            self._show(text, batch_idx + 1, _batches(getattr(trainer, batches)))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last metrics, and leaves the bar as a line."""
        self._end_epoch(trainer)
        self._show_training(trainer, now=True)
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the bar as a line, if this is no part of a fit."""
        if trainer.state.fn != "fit":
            self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the bar as a line."""
        self._stop()

    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the terminal."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the terminal, and sends what was written to the process that started this one."""
        self._stop()
        if starts_by_multiprocessing(trainer):
            carry(trainer, _WRITTEN, pickle.dumps((self.written, self.to_paste)))

    def take_written(self, trainer: Trainer) -> None:
        """Takes what a process that multiprocessing started has written."""
        data = carried(trainer, _WRITTEN)
        if data is not None:
            self.written, self.to_paste = pickle.loads(data)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the terminal, for processes that are spawned."""
        return {**self.__dict__, "_bar": None}

    def _end_epoch(self, trainer: Trainer) -> None:
        line, self._line = self._line, None
        if line is not None and self.shows and not is_terminal():
            metrics = [as_text(name, value) for name, value in shown_metrics(trainer).items()]
            left = "" if trainer.should_stop else self._left(*_progress(trainer))
            print("  ".join([line, *metrics, *([left] if left else [])]), flush=True)

    @property
    def _draws(self) -> bool:
        return self.shows and is_terminal()

    def _show_training(self, trainer: Trainer, validating: bool = False, now: bool = False) -> None:
        if not self._draws:  # to read the values of metrics is to wait for the device
            return
        done, total = _progress(trainer)
        metric = next((as_text(name, value) for name, value in shown_metrics(trainer).items()), "")
        text = f"Epoch {self._epoch}" + (", validating" if validating else "")
        left = "" if trainer.should_stop else self._left(done, total)
        self._show(text, done, total, left, metric, now=now)

    def _show(
        self, text: str, done: float, total: float | None, left: str = "", metric: str = "", now: bool = False
    ) -> None:
        if not self._draws:
            return
        if self._bar is None:
            self._bar = Bar()
        self._bar.show(text, done, total, left, metric, now=now)

    def _stop(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _left(self, done: float, total: float | None) -> str:
        """Estimates the time that is left from the time since training started, validation included."""
        since = done - self._first
        if total is None or since <= 0 or done >= total:
            return ""
        return f"{_clock((time.monotonic() - self._start) / since * (total - done))} left"


def tell_written(trainer: Trainer, files: Mapping[str, Path], to_paste: Sequence[str] = ()) -> None:
    """Reports files, by what they are, and lines of Python that load them: at the end of the run, or else at once."""
    console = next((each for each in callbacks_of(trainer) if isinstance(each, FitConsole)), None)
    if console is not None:
        console.written.update(files)
        console.to_paste.extend(to_paste)
    else:
        print_lines([*(f"{what}: {path}" for what, path in files.items()), *to_paste])


def _epoch(trainer: Trainer) -> str:
    limit = trainer.max_epochs
    number = trainer.current_epoch + 1
    return f"{number}" if limit is None or limit == _UNLIMITED else f"{min(number, limit)}/{limit}"


def _progress(trainer: Trainer) -> tuple[float, float | None]:
    """Returns how much of the training is done, of how much: batches, or optimizer steps if these are limited.

    In a resumed run, what was done before counts.
    """
    if trainer.max_steps != _UNLIMITED:
        return float(trainer.global_step), float(trainer.max_steps)
    done, per_epoch = float(trainer.fit_loop.epoch_loop.total_batch_idx + 1), float(trainer.num_training_batches)
    epochs = trainer.max_epochs
    if epochs is None or epochs == _UNLIMITED or per_epoch == float("inf"):
        return done, None
    return min(done, per_epoch * epochs), per_epoch * epochs


def _batches(counts: Any) -> float | None:
    numbers = counts if isinstance(counts, list) else [counts]
    total = float(sum(numbers))
    return None if total == float("inf") else total


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
