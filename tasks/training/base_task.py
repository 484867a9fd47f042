"""What all tasks have in common: how they are optimized, and that their files say which task they are of."""

import inspect
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import AdamW

from lora_plugins import ConfigError
from lora_plugins.errors import listing
from lora_plugins.field_checks import Check, check_fields, number_from, optional
from lora_plugins.integrations.lightning import LoraCheckpointMixin
from lora_plugins.tasks.training.optimization import (
    LR,
    WEIGHT_DECAY,
    OptimizerCallable,
    SchedulerCallable,
    check_optimizer,
    check_scheduler,
)
from lora_plugins.tasks.training.provenance import PROVENANCE_KEY

_CHECKS: Mapping[str, Check] = {
    "lr": number_from(0),
    "weight_decay": number_from(0),
    "lr_scheduler": optional(check_scheduler),
    "ema": number_from(0, below=1),
}
"""What the arguments about optimization can be, by name; `optimizer` is checked with them."""

Task = TypeVar("Task", bound="BaseTask")


class BaseTask(LoraCheckpointMixin):
    """A task that is optimized as its arguments say, and writes its provenance into its files."""

    optimizer: OptimizerCallable | None
    lr: float
    weight_decay: float
    lr_scheduler: SchedulerCallable | None
    ema: float

    def _set_optimization(
        self,
        optimizer: OptimizerCallable | None,
        lr: float,
        weight_decay: float,
        lr_scheduler: SchedulerCallable | None,
        ema: float,
        default: tuple[float, float] = (LR, WEIGHT_DECAY),
    ) -> None:
        """Checks and sets how the task is optimized; `default` is what its default optimizer has by itself."""
        check_fields({"lr": lr, "weight_decay": weight_decay, "lr_scheduler": lr_scheduler, "ema": ema}, _CHECKS)
        check_optimizer(optimizer, lr=lr, weight_decay=weight_decay, default=default)
        self.optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.lr_scheduler, self.ema = lr_scheduler, ema
        self._defaults = {"optimizer": None, "lr": default[0], "weight_decay": default[1], "lr_scheduler": None}
        self._is_asked = False

    def configure_callbacks(self) -> list[Callback]:
        """The moving average, if there is one."""
        return [EMAWeightAveraging(decay=self.ema)] if self.ema else []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of the parameters that require gradients, AdamW by default, and its scheduler, if there is one.

        Raises:
            ConfigError: If a scheduler is to follow a training without end.
        """
        self._is_asked = True
        make = self.optimizer or partial(AdamW, lr=self.lr, weight_decay=self.weight_decay)
        optimizer = make([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError("lr_scheduler needs to know the number of steps. Set max_epochs or max_steps.")
        scheduler = self.lr_scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Warns if arguments are not used, since the section `optimizer:` of a configuration replaces the optimizer."""
        chosen = [name for name, default in self._defaults.items() if getattr(self, name) != default]
        is_own = type(self).configure_optimizers is BaseTask.configure_optimizers
        if chosen and is_own and not self._is_asked:
            rank_zero_warn(
                "The section `optimizer:` replaces the optimizer of the task. Not used of model.init_args: "
                f"{listing(chosen)}. What is meant for the optimizer belongs in `optimizer:` and `lr_scheduler:`."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the provenance into a checkpoint."""
        checkpoint[PROVENANCE_KEY] = self.provenance()

    def file_entries(self, target: str) -> dict[str, Any]:
        """What a `LoraCallback` writes into the files of an adapter of `target`: the provenance."""
        return {PROVENANCE_KEY: {**self.provenance(), "target": target or None}}

    def provenance(self) -> dict[str, Any]:
        """Which task this is, in plain types: class and arguments."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "arguments": json.loads(json.dumps(dict(self.hparams))),
        }

    def _datamodule(self) -> Any:
        """The data module of the trainer, if there are both."""
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)


def task_of_checkpoint(cls: type[Task], checkpoint: dict[str, Any], **changed: Any) -> Task:
    """Builds the task of a checkpoint that was read, as `load_from_checkpoint` does that of a file.

    `changed` are arguments in place of those that it says.
    """
    said, hyperparameters = checkpoint[PROVENANCE_KEY]["arguments"], checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
    arguments = {**said, **hyperparameters, **changed}  # what is said is plain JSON, without tuples
    taken = inspect.signature(cls.__init__).parameters.values()
    if all(each.kind is not each.VAR_KEYWORD for each in taken):  # as Lightning: it is given only what it names
        arguments = {each.name: arguments[each.name] for each in taken if each.name in arguments}
    task = cls(**arguments)
    task.configure_model()
    task.on_load_checkpoint(checkpoint)
    task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    return task
