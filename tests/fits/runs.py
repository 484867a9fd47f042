"""Carries out a run, and takes down all that has to be the same on both sides."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.fits.draw import Fit
from tests.fits.module import DTYPES, FitModule
from tests.fits.networks import FEATURES
from tests.fits.trainers import Stop, StoppedError, best_file, make_trainer
from tests.fits.weights import effective

Record = dict[str, str | list[float] | Mapping[str, Tensor]]
"""What came out, by what it is."""


class Side(Protocol):
    """What the two sides differ in."""

    def module(self) -> FitModule: ...

    def callbacks(self, folder: Path) -> list[Callback]: ...

    def read(self, path: Path) -> FitModule: ...

    def finish(self, trainer: Trainer, module: FitModule) -> None: ...

    def exported(self, module: FitModule) -> dict[str, Tensor]: ...

    def saved(self, module: FitModule) -> FitModule: ...


def loader(fit: Fit, seed: int, samples: int, batch_size: int, shuffle: bool = False) -> DataLoader:
    """Random data, in the same order each time."""
    x = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=DTYPES[fit.precision])
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    order = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle, generator=order)


@dataclass
class Run:
    """One side of a run.

    Args:
        fit: The settings.
        side: Which side.
        folder: Where its files go.
    """

    fit: Fit
    side: Side
    folder: Path
    record: Record = field(default_factory=dict)

    def carry_out(self) -> Record:
        """Fits; goes on, where the fit was stopped; and does what comes after."""
        self.module = self.side.module()
        self.callbacks = self.side.callbacks(self.folder)
        stop = [] if self.fit.stop == "none" else [Stop(self.fit)]
        self.trainer = make_trainer(self.fit, self.folder, [*self.callbacks, *stop], self.fit.epochs)
        if self.fit.before == "validate":
            self.trainer.validate(self.module, loader(self.fit, 2, 16, 8), verbose=False)
            self.record["validation before"] = list(self.module.validations)
        ended = self.try_to_fit()
        for callback in stop:
            self.trainer.callbacks.remove(callback)
        files = sorted(path.name for path in self.folder.glob("*.ckpt"))
        self.record["checkpoints"] = " ".join(files)
        if self.fit.build != "setup":  # which only a trainer calls
            for name in files:
                self.record[f"read {name}"] = effective(self.side.read(self.folder / name))
        if self.fit.goes_on != "none" and (not ended or self.fit.stop == "stop"):
            ended = self.go_on()
        if ended:
            AFTER[self.fit.after](self)
        return self.record

    def fit_on(self, what: str, path: Path | None = None) -> None:
        """Fits, and takes down losses and weights."""
        self.module.losses.clear()
        self.module.validations.clear()
        training = loader(self.fit, 1, self.fit.samples, self.fit.batch_size, self.fit.shuffle)
        try:
            self.trainer.fit(self.module, training, loader(self.fit, 2, 16, 8), ckpt_path=path)
            self.side.finish(self.trainer, self.module)
            self.record[f"{what}: weights"] = effective(self.module)
            self.record[f"{what}: export"] = self.side.exported(self.module)
            saved = self.side.saved(self.module)
            for name, tower in saved.towers.items():
                self.record[f"{what}: adapter of {name}"] = without_moved(effective(tower))
        finally:
            self.record[f"{what}: losses"] = list(self.module.losses)
            self.record[f"{what}: validations"] = list(self.module.validations)

    def try_to_fit(self) -> bool:
        """Fits for the first time; returns whether nothing has stopped it."""
        try:
            self.fit_on("fit")
        except (StoppedError, KeyboardInterrupt, SystemExit) as stopped:  # Lightning makes the last of the second
            self.record["stopped by"] = type(stopped).__name__
            return False
        return True

    def newest(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return max(self.folder.glob("*.ckpt"), key=lambda path: (order(path.name), path.name), default=None)

    def go_on(self) -> bool:
        """Goes on with a stopped fit; returns whether there is something to go on from."""
        path, epochs = self.newest(), self.fit.epochs
        if self.fit.goes_on == "resume":
            if path is None:
                return False
            self.module, epochs = self.side.module(), epochs + 1
            self.callbacks = self.side.callbacks(self.folder)
        self.trainer = make_trainer(self.fit, self.folder / "further", self.callbacks, epochs)
        self.fit_on(self.fit.goes_on, path)
        return True

    def fit_further(self) -> None:
        """Fits some epochs more with the same trainer."""
        self.trainer.fit_loop.max_epochs = self.trainer.current_epoch + 2
        self.fit_on("second fit")

    def fit_anew(self) -> None:
        """Fits with another trainer."""
        self.trainer = make_trainer(self.fit, self.folder / "anew", self.callbacks, 2)
        self.fit_on("fit of a new trainer")

    def test(self) -> None:
        """Tests and predicts."""
        self.module.validations.clear()
        self.trainer.test(self.module, loader(self.fit, 2, 16, 8), verbose=False)
        self.record["test"] = list(self.module.validations)
        self.record["predictions"] = {"": torch.cat(self.trainer.predict(self.module, loader(self.fit, 2, 16, 8)))}

    def test_best(self) -> None:
        """Tests with the best checkpoint, if there is one."""
        path = best_file(self.trainer)
        if path:
            self.module.validations.clear()
            self.trainer.test(self.module, loader(self.fit, 2, 16, 8), ckpt_path=path, verbose=False)
            self.record["test of the best"] = list(self.module.validations)

    def fit_a_copy(self) -> None:
        """Fits a copy of the module, with another trainer."""
        self.module.trainer = None
        self.module = copy.deepcopy(self.module)
        self.fit_anew()

    def resume(self) -> None:
        """Saves the fitted module, and lets a new one go on from there."""
        path = self.folder / "fitted.ckpt"
        self.trainer.save_checkpoint(path)
        self.module, epochs = self.side.module(), self.trainer.current_epoch + 1
        self.callbacks = self.side.callbacks(self.folder)
        self.trainer = make_trainer(self.fit, self.folder / "resumed", self.callbacks, epochs)
        self.fit_on("fit from the fitted", path)

    def validate(self) -> None:
        """Validates a new module with the newest checkpoint."""
        path = self.newest()
        if path is None:
            return
        module, callbacks = self.side.module(), self.side.callbacks(self.folder)
        trainer = make_trainer(self.fit, self.folder / "validated", callbacks, 1)
        trainer.validate(module, loader(self.fit, 2, 16, 8), ckpt_path=path, verbose=False)
        self.record["validation of the newest"] = list(module.validations)


def without_moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what the module moves by hand inside of a tower: no adapter folder has it, as a warning says."""
    return {name: tensor for name, tensor in weights.items() if name != "center"}


def order(name: str) -> int:
    """The step in the name of a checkpoint; those named otherwise are the newest."""
    step = name.partition("step=")[2].partition(".")[0].partition("-")[0]
    return int(step) if step else 10**6


AFTER = {
    "nothing": lambda run: None,
    "fit": Run.fit_further,
    "new trainer": Run.fit_anew,
    "test": Run.test,
    "test best": Run.test_best,
    "copy": Run.fit_a_copy,
    "validate": Run.validate,
    "resume": Run.resume,
}
"""What comes after the fit."""
