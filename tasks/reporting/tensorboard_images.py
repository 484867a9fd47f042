"""Images in TensorBoard: predictions and the confusion matrix, after each validation."""

from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lora_plugins import ConfigError
from lora_plugins.field_checks import check_count
from lora_plugins.integrations.lightning.shims import is_fast_dev_run
from lora_plugins.tasks.reporting.figures import confusion_figure, examples_figure
from lora_plugins.tasks.reporting.val_loaders import evenly_spaced, first_val_loader, has_places
from lora_plugins.tasks.training import VisionTask


class TensorBoardImages(Callback):
    """Adds predictions for some samples, and the confusion matrix, to TensorBoard after each validation of a fit.

    Curves need no callback: tasks log their metrics.

    Args:
        samples: The number of samples of the val split to show, evenly spaced over it.
        every: The number of validations from one time to the next.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(self, samples: int = 4, every: int = 1) -> None:
        check_count("samples", samples)
        check_count("every", every)
        self.samples, self.every, self._validations = samples, every, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is a task to draw and a TensorBoard to draw in.

        Raises:
            ConfigError: If one of the two is missing.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, VisionTask):
            raise ConfigError(f"TensorBoardImages draws tasks of lora_plugins; {type(pl_module).__name__} is not one.")
        # Without any logger (`logger: false`) nothing is to be logged; with only other loggers, images would be lost.
        others = trainer.loggers and not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if others and not is_fast_dev_run(trainer):
            raise ConfigError("TensorBoardImages needs a TensorBoardLogger among the trainer's loggers.")
        self._validations = 0

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the figures and adds them."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.state.fn != "fit" or trainer.sanity_checking or not writers:
            return
        self._validations += 1
        if (self._validations - 1) % self.every:
            return
        task = cast(VisionTask, pl_module)
        for name, figure in self._figures(trainer, task).items():
            for writer in writers:
                cast(Any, writer).add_figure(name, figure, trainer.global_step, close=False)

    def _figures(self, trainer: Trainer, task: VisionTask) -> dict[str, Any]:
        loader, figures = first_val_loader(trainer), dict[str, Any]()
        places = evenly_spaced(loader, self.samples) if has_places(loader) else []
        if places and (examples := examples_figure(task, loader, places)) is not None:
            figures["val/examples"] = examples
        if "val" in task.confusion:
            figures["val/confusion"] = confusion_figure(task.confusion["val"], task.class_labels)
        return figures
