"""What the tests of checkpoints share: the paths on which Lightning saves, and modules that build layers late."""

import lightning
import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from packaging.version import Version

from tests.integrations.lightning.toys import Classifier, loader, lora, trainer

ADAPTER_KEYS = {f"net.{i}.lora_{factor}.default" for i in (0, 3) for factor in "AB"}


class StopError(Exception):
    pass


class Failing(Classifier):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            raise StopError


def by_model_checkpoint(folder, **options):
    saver = ModelCheckpoint(folder, filename="it", **options)
    run = trainer(folder, [lora(), saver])
    run.fit(Classifier(), loader(), loader())
    return folder / "it.ckpt"


def by_last(folder):
    run = trainer(folder, [lora(), ModelCheckpoint(folder, save_last=True)])
    run.fit(Classifier(), loader())
    return folder / "last.ckpt"


def by_exception(folder):
    run = trainer(folder, [lora(), OnExceptionCheckpoint(folder, "it")])
    with pytest.raises(StopError):
        run.fit(Failing(), loader())
    return folder / "it.ckpt"


def by_trainer(folder, cls=Classifier, **options):
    run = trainer(folder, [lora()])
    run.fit(cls(), loader())
    run.save_checkpoint(folder / "it.ckpt", **options)
    return folder / "it.ckpt"


PATHS = {
    "model_checkpoint": by_model_checkpoint,
    "weights_only": lambda folder: by_model_checkpoint(folder, save_weights_only=True),
    "top_k_monitor": lambda folder: by_model_checkpoint(folder, monitor="val/loss", save_top_k=1),
    "last": by_last,
    "on_exception": by_exception,
    "trainer": by_trainer,
    "trainer_weights_only": lambda folder: by_trainer(folder, weights_only=True),
}


class Late(LightningModule):
    """Makes its layers when the trainer asks for it."""

    training_step, validation_step, test_step = Classifier.training_step, Classifier.validation_step, None
    _step, configure_optimizers, forward = Classifier._step, Classifier.configure_optimizers, Classifier.forward
    lr = 0.05

    def build(self):
        if not hasattr(self, "net"):
            self.net = Classifier().net


def shown_by_lightning(line: str):
    """Expects the error with which Lightning refuses a file, and shows a line in it; older ones show its beginning."""
    if Version(lightning.__version__) < Version("2.6.6"):
        return pytest.raises(ModuleNotFoundError, match=r"this file has a LoRA adapter, and not the base: load it as")
    return pytest.raises(ValueError, match=line)
