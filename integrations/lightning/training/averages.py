"""Callbacks that average weights copy the module in their `setup`, before it is adapted."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging


def copy_into_averages(trainer: Trainer, module: LightningModule) -> None:
    """Lets averaging callbacks copy the adapted module, by calling their `setup` again."""
    averaging: Sequence[Callback] = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging)
    ]
    for callback in averaging:
        callback.setup(trainer, module, "fit")
