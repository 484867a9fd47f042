"""Callbacks that average weights: they copy the module in `setup`, before it is adapted, and keep the copy."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lora_plugins.integrations.lightning.module import frozen_as_built, frozen_tensors, outside
from lora_plugins.integrations.lightning.shims import Averaging, averaged_module, drop_average


def copy_into_averages(trainer: Trainer, module: LightningModule) -> None:
    """Lets averaging callbacks copy the module as it is now, by calling their `setup` again."""
    stage = trainer.state.fn
    assert stage is not None
    for callback in _averaging(trainer):
        drop_average(callback)
        callback.setup(trainer, module, stage.value)


def keep_base_of_averages(trainer: Trainer, module: LightningModule) -> None:
    """Lets averages have the frozen base as it is: that of equal values differs from them by rounding.

    Callbacks exchange their average with the module in validation and when training ends, so this is called before.
    """
    averages = [average for callback in _averaging(trainer) if (average := averaged_module(callback)) is not None]
    if not averages:
        return
    beside, built = outside(module), frozen_as_built(module)
    frozen = {**frozen_tensors(module), **{name: beside[name] for name in built}}
    for average in averages:
        named = {**dict(average.named_parameters()), **dict(average.named_buffers())}
        with torch.no_grad():
            for name, tensor in frozen.items():
                if name in named:
                    named[name].copy_(tensor)


def drop_averages(trainer: Trainer) -> None:
    """Lets averaging callbacks forget their copies when `fit` ends: the module has the average, or what is best."""
    for callback in _averaging(trainer):
        drop_average(callback)


def _averaging(trainer: Trainer) -> list[Averaging]:
    found = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in found if isinstance(callback, WeightAveraging | StochasticWeightAveraging)]
