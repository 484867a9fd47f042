"""The Trainer of a run, with its callbacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from tests.fits.draw import Fit

AVERAGING: Mapping[str, Callable[[Fit], list[Callback]]] = {
    "none": lambda _: [],
    "swa": lambda fit: [
        StochasticWeightAveraging(0.01, swa_epoch_start=1 if fit.epochs > 1 else 0.5, annealing_epochs=2)
    ],
    "ema": lambda _: [EMAWeightAveraging(decay=0.8)],
    "weights": lambda _: [WeightAveraging()],
}

CHECKPOINTS: Mapping[str, dict[str, Any]] = {
    "last": {"monitor": "val", "save_last": True, "save_top_k": 1},
    "steps": {"every_n_train_steps": 2, "save_top_k": -1},
    "epoch": {"monitor": "val", "save_top_k": 2},
}


class StoppedError(Exception):
    """What a run is stopped by."""


class Same(Callback):
    """Gives each batch the same random numbers, whatever was drawn before it."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        torch.manual_seed(1000 + trainer.fit_loop.epoch_loop.total_batch_idx)


class Stop(Callback):
    """Stops a fit, or saves it, at one call of one hook.

    Args:
        fit: The settings.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit, self.calls = fit, 0
        setattr(self, fit.stop_in, self.count)

    def count(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        """Takes note of a call."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.calls += 1
        if self.calls == self.fit.stop_at:
            ACTS[self.fit.stop](trainer)


def fail(trainer: Trainer) -> None:
    """Stops by an exception."""
    raise StoppedError


def interrupt(trainer: Trainer) -> None:
    """Stops as Ctrl-C does."""
    raise KeyboardInterrupt


def end(trainer: Trainer) -> None:
    """Asks for an end."""
    trainer.should_stop = True


def save(trainer: Trainer) -> None:
    """Saves a checkpoint by hand."""
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "by_hand.ckpt")


ACTS: Mapping[str, Callable[[Trainer], None]] = {"raise": fail, "interrupt": interrupt, "stop": end, "save": save}


def make_trainer(fit: Fit, folder: Path, callbacks: Sequence[Callback], epochs: int) -> Trainer:
    """Makes a trainer whose files go into a folder."""
    own = list(own_callbacks(fit, folder))
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=fit.checkpoints != "none",
        callbacks=[*callbacks, *own] if fit.order == "first" else [*own, *callbacks],
        max_epochs=epochs,
        max_steps=fit.max_steps,
        accumulate_grad_batches=fit.accumulate,
        gradient_clip_val=fit.clip,
        gradient_clip_algorithm=None if fit.clip is None else fit.clip_by,
        val_check_interval=fit.check_interval,
        check_val_every_n_epoch=fit.check_every,
        num_sanity_val_steps=fit.sanity,
        inference_mode=fit.inference_mode,
        reload_dataloaders_every_n_epochs=fit.reload,
        limit_train_batches=fit.limit,
        overfit_batches=fit.overfit,
        precision=fit.precision,
    )


def own_callbacks(fit: Fit, folder: Path) -> Iterator[Callback]:
    """The callbacks that both sides have."""
    yield from AVERAGING[fit.averaging](fit)
    if fit.accumulate_by_epoch:
        yield GradientAccumulationScheduler({0: 2, 1: 1})
    if fit.on_exception:
        yield OnExceptionCheckpoint(folder, filename="exception")
    if fit.finder:
        yield LearningRateFinder(num_training_steps=6, update_attr=False)
    if fit.early:
        yield EarlyStopping("val", patience=1)
    if fit.checkpoints != "none":
        options = dict(CHECKPOINTS[fit.checkpoints])
        if fit.best and "monitor" not in options:
            options["monitor"] = "train"
        yield ModelCheckpoint(folder, filename="{epoch}-{step}", save_weights_only=fit.weights_only, **options)
    yield Same()


def best_file(trainer: Trainer) -> str:
    """The best checkpoint of a run, or nothing."""
    found = [c.best_model_path for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
    return found[0] if found else ""
