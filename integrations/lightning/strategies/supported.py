"""Checks that an adapter survives the strategy, before anything happens."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning_utilities.core.rank_zero import rank_zero_warn

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.shims import callbacks_of, saves_shards, starts_by_multiprocessing
from lora_plugins.integrations.lightning.strategies.sharding import is_sharded


def check_trainer(trainer: object) -> None:
    """Checks that a Trainer is not one of the package `pytorch_lightning`, whose classes only have the same names.

    Raises:
        StateError: If it is.
    """
    if not isinstance(trainer, Trainer):
        raise StateError(
            f"LoraCallback belongs to lightning.pytorch, and the Trainer is {type(trainer).__module__}."
            f"{type(trainer).__name__}. Import Trainer and LightningModule from lightning.pytorch; if another package "
            "imports the other one, first call alias_pytorch_lightning() of lora_plugins.integrations.lightning."
        )


def check_callbacks(trainer: Trainer) -> None:
    """Checks that no other callback removes what an adapter acts on.

    Raises:
        StateError: If one does, naming it.
    """
    pruning = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, ModelPruning)]
    if pruning:
        raise StateError(
            f"{pruning[0]} puts masked weights in place of those that adapters act on, and of A and B. Prune in a run "
            "without LoraCallback, before it (make_pruning_permanent=True) or after the adapter is merged."
        )


def check_strategy(trainer: Trainer, given: Mapping[str, object]) -> None:
    """Checks that an adapter survives the strategy, and that this can do what the options of a callback ask for.

    Raises:
        StateError: If not, naming the strategy.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, DeepSpeedStrategy):
        raise StateError(
            f"LoraCallback does not support {name}: its engine writes and loads checkpoints without Lightning, and "
            "what becomes of an adapter there has not been checked yet. Use strategy='ddp' (an adapter's gradients and "
            "optimizer state are small), or ModelParallelStrategy where the frozen base is too large for one device."
        )
    if is_sharded(trainer):
        _check_sharding(strategy, name, given)


def _check_sharding(strategy: Strategy, name: str, given: Mapping[str, object]) -> None:
    """Checks that tensors are split in a way that an adapter follows, and that nothing asked for needs whole ones."""
    if isinstance(strategy, FSDPStrategy) and not saves_shards(strategy):
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
    others = [file.format for file in given.get("adapter_files", ()) if not file.is_ours]  # type: ignore[attr-defined]
    if others:
        raise StateError(
            f"{name} splits weights over processes, so the adapter can be written in our own format only, not in "
            f"{listing(others)}. Convert it afterwards: `lora-plugins convert`."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise StateError(
            f"LoraCallback supports {name} for sharded data parallelism (FSDP2) only: an adapter would not follow a "
            "layer that tensor parallelism splits. Set tensor_parallel_size=1 and data_parallel_size to the number of "
            "devices."
        )


def warn_if_spawned(trainer: Trainer) -> None:
    """Warns that processes started by multiprocessing do not return their adapter to the main process."""
    if starts_by_multiprocessing(trainer):
        rank_zero_warn(
            "With this strategy, fit runs in other processes, and Lightning copies only the base's tensors back into "
            "the main process: the module there will have no adapter. Set merge_on_fit_end=True, save_adapter_to, or "
            "use strategy='ddp'."
        )
