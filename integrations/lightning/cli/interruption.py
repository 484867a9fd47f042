"""Ctrl-C: the first one ends a fit as if it were over and saves what there is; the second one ends at once.

SIGTERM ends it after the batch, and saves nothing.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_plugins.cli import INTERRUPTED, signal_calls

_STOPPING = "Stopping, to save what there is. Ctrl-C again ends at once."
_NOTHING = "Interrupted before training: nothing was saved."
_AT_ONCE = "Ended at once."
_SHOW_CURSOR = "\x1b[?25h"
"""What a terminal needs whose bar was not stopped."""


class Interruption(Callback):
    """Handles Ctrl-C while it is `listening`; whether there was one is `asked`.

    Processes that train together stop together, which a signal to each of them cannot promise: there Ctrl-C stays
    Lightning's, which saves nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._trainer: Trainer | None = None
        self._has_begun = False
        self._process = os.getpid()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that from now on there is something to save."""
        self._trainer = trainer

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes one batch of the epoch at least: one without any would be logged with what is left of the last."""
        self._has_begun = False
        trainer.should_stop = trainer.should_stop and not self.asked

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the fit if that was asked for before."""
        self._has_begun = True
        self._end_if_asked(trainer)

    def listening(self) -> AbstractContextManager[None]:
        """Handles Ctrl-C in place of Python, in the main thread of a single process."""
        return signal_calls(signal.SIGINT, self._answer)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the trainer, for processes that are spawned."""
        return {**self.__dict__, "_trainer": None}

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data goes on, for the validation at the end
        if self.asked:
            _say(_AT_ONCE)
            os._exit(INTERRUPTED)
        self.asked = True
        if self._trainer is None:
            _say(_NOTHING)
            raise SystemExit(INTERRUPTED)
        if self._trainer.world_size > 1:
            raise KeyboardInterrupt
        _say(_STOPPING)
        self._end_if_asked(self._trainer)

    def _end_if_asked(self, trainer: Trainer) -> None:
        if self.asked and self._has_begun:
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None


def _say(line: str) -> None:
    """Writes a line at once, even during another write: over the line of a bar, which is drawn again below it."""
    terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
    text = f"\r\x1b[2K{line}{_SHOW_CURSOR}\n" if terminal else f"{line}\n"
    os.write(2, text.encode())


@contextmanager
def sigterm_after_batch(trainer: Trainer) -> Iterator[None]:
    """Leaves SIGTERM to Lightning while it trains, which ends after the batch, and calls the handler that was there."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler):
        yield
        return
    with signal_calls(
        signal.SIGTERM, lambda number, frame: None if trainer.received_sigterm else handler(number, frame)
    ):
        yield
