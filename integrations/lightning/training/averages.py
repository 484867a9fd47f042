"""Callbacks that average weights: they copy the module in `setup`, before it is adapted, and keep the copy."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lora_plugins.integrations.lightning.shims import Averaging, drop_average


def copy_into_averages(trainer: Trainer, module: LightningModule) -> None:
    """Lets averaging callbacks copy the module as it is now, by calling their `setup` again."""
    stage = trainer.state.fn
    assert stage is not None
    for callback in _averaging(trainer):
        drop_average(callback)
        callback.setup(trainer, module, stage.value)


def drop_averages(trainer: Trainer) -> None:
    """Lets averaging callbacks forget their copies when `fit` ends: the module has the average, or what is best."""
    for callback in _averaging(trainer):
        drop_average(callback)


def _averaging(trainer: Trainer) -> list[Averaging]:
    found = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in found if isinstance(callback, WeightAveraging | StochasticWeightAveraging)]
