"""Which strategies of Lightning an adapter survives; the others are refused before anything happens."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins import StateError

_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def refuse_foreign(trainer: object) -> None:
    """Refuses a Trainer of the package `pytorch_lightning`, whose classes are others of the same names.

    Raises:
        StateError: If `trainer` is one.
    """
    if not isinstance(trainer, Trainer):
        raise StateError(
            f"LoraCallback belongs to lightning.pytorch, and the Trainer is {type(trainer).__module__}."
            f"{type(trainer).__name__}. Import Trainer and LightningModule from lightning.pytorch."
        )


def refuse_strategy(trainer: Trainer) -> None:
    """Refuses strategies that split parameters over processes.

    Their checkpoints do not pass through a state dict of the whole module, so the frozen base could be neither left
    out nor completed on loading, and shards of a weight cannot be merged.

    Raises:
        StateError: If the trainer has such a strategy, naming it.
    """
    if isinstance(trainer.strategy, _SHARDED):
        raise StateError(
            f"LoraCallback does not support {type(trainer.strategy).__name__}, which splits parameters over processes: "
            "their checkpoints could not be completed on loading. Use strategy='ddp'; an adapter's gradients and "
            "optimizer state are small."
        )


def warn_spawned(trainer: Trainer) -> None:
    """Warns that a process started by multiprocessing does not bring its adapter back to the main process."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            "With this strategy, fit runs in other processes, and Lightning copies only the base's tensors back into "
            "the main process: the module there will have no adapter. Set merge_on_fit_end=True, save_adapter_to, or "
            "use strategy='ddp'."
        )
