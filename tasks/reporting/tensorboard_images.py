"""Pictures in TensorBoard: predictions and the confusion matrix, after each epoch."""

from __future__ import annotations

from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lora_plugins import ConfigError
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.reporting.figures import (
    confusion_figure,
    examples_figure,
    first_loader,
    predicted_logits,
    spread,
)
from lora_plugins.tasks.training import VisionTask


class TensorBoardImages(Callback):
    """Adds to TensorBoard, after each validation of a fit, what the model says of some samples, and its confusions.

    Curves are there without it: tasks log their metrics, and TensorBoard is where Lightning puts them.

    Args:
        samples: How many samples of the val split to show, evenly spread over it.
        every: After every how many validations.
    """

    def __init__(self, samples: int = 4, every: int = 1) -> None:
        if samples < 1 or every < 1:
            raise ConfigError(f"samples is {samples} and every {every}; both are at least 1.")
        self.samples, self.every, self._seen = samples, every, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a task to draw and a TensorBoard to draw in.

        Raises:
            ConfigError: Where one of the two is missing.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, VisionTask):
            raise ConfigError(f"TensorBoardImages draws our tasks; {type(pl_module).__name__} is none.")
        # Without any logger (`logger: false`) nothing is to be logged; with others only, the pictures would be lost.
        others = trainer.loggers and not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if others and not trainer.fast_dev_run:
            raise ConfigError("TensorBoardImages needs a TensorBoardLogger among the trainer's loggers.")
        self._seen = 0

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.state.fn != "fit" or trainer.sanity_checking or not writers:
            return
        self._seen += 1
        if (self._seen - 1) % self.every:
            return
        task = cast(VisionTask, pl_module)
        for name, figure in self._figures(trainer, task).items():
            for writer in writers:
                cast(Any, writer).add_figure(name, figure, trainer.global_step, close=False)

    def _figures(self, trainer: Trainer, task: VisionTask) -> dict[str, Any]:
        loader = first_loader(trainer)
        indices = spread(len(cast(Any, loader.dataset)), self.samples)
        batch = Batch.read(loader.collate_fn([loader.dataset[i] for i in indices]))
        figures = {}
        if batch.targets is not None:
            predicted = predicted_logits(task, batch.images).argmax(1)
            figures["val/examples"] = examples_figure(task, batch.images, batch.targets, predicted)
        if "val" in task.confusion:
            names = task.class_names or [str(i) for i in range(task.model_config.num_classes)]
            figures["val/confusion"] = confusion_figure(task.confusion["val"], names)
        return figures
