"""Which strategies of Lightning an adapter survives; the others are refused before anything happens."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.strategies.sharded import is_sharded


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


def refuse_strategy(trainer: Trainer, given: Mapping[str, object]) -> None:
    """Refuses strategies, and what they cannot do.

    Args:
        trainer: The trainer.
        given: The callback's options by name.

    Raises:
        StateError: If an adapter would not survive, naming the strategy.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, DeepSpeedStrategy):
        raise StateError(
            f"LoraCallback does not support {name}: its engine writes and loads checkpoints past Lightning, and what "
            "becomes of an adapter there has not been checked yet. Use strategy='ddp' (an adapter's gradients and "
            "optimizer state are small), or ModelParallelStrategy where the frozen base is too large for one device."
        )
    if not is_sharded(trainer):
        return
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type != "sharded":
        raise StateError(
            f"LoraCallback supports {name} with state_dict_type='sharded' only: full state dicts of FSDP could not be "
            "checked. save_adapter_to writes a whole adapter, and ModelParallelStrategy (FSDP2) whole checkpoints."
        )
    impossible = {"merge_on_fit_end": False, "export_to": None, "merge_source": "last"}
    wrong = [f"{key}={value!r}" for key, value in impossible.items() if given[key] != value]
    if wrong:
        raise StateError(
            f"{name} splits weights over processes, so they cannot be merged when fit ends. Set {listing(wrong)}. "
            "save_adapter_to works, and `lora-plugins merge` and `export` make a merged file of a checkpoint that is "
            "one file."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise StateError(
            f"LoraCallback supports {name} for sharded data parallelism (FSDP2) only: an adapter would not follow a "
            "layer that tensor parallelism splits. Set tensor_parallel_size=1 and data_parallel_size to the number of "
            "devices."
        )


def warn_spawned(trainer: Trainer) -> None:
    """Warns that a process started by multiprocessing does not bring its adapter back to the main process."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            "With this strategy, fit runs in other processes, and Lightning copies only the base's tensors back into "
            "the main process: the module there will have no adapter. Set merge_on_fit_end=True, save_adapter_to, or "
            "use strategy='ddp'."
        )
