"""Callbacks that average weights: they copy the module in `setup`, before it is adapted, and keep the copy."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

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
    averages = [(average, "") for callback in _averaging(trainer) if (average := averaged_module(callback)) is not None]
    averages += _of_other_callbacks(trainer, module)
    if not averages:
        return
    beside, built = outside(module), frozen_as_built(module)
    frozen = {**frozen_tensors(module), **{name: beside[name] for name in built}}
    for average, prefix in averages:
        named = {**dict(average.named_parameters(prefix)), **dict(average.named_buffers(prefix))}
        with torch.no_grad():
            for name, tensor in frozen.items():
                if name in named:
                    named[name].copy_(tensor)


def drop_averages(trainer: Trainer) -> None:
    """Lets averaging callbacks forget their copies when `fit` ends: the module has the average, or what is best."""
    for callback in _averaging(trainer):
        drop_average(callback)


def renews_statistics(trainer: Trainer) -> bool:
    """Whether the epoch trains nothing: after averaging, SWA passes over the data for the statistics of norms alone."""
    found = trainer.callbacks  # type: ignore[attr-defined]
    swa = [callback for callback in found if isinstance(callback, StochasticWeightAveraging)]
    return any(trainer.current_epoch == callback.swa_end + 1 for callback in swa)


def _of_other_callbacks(trainer: Trainer, module: LightningModule) -> list[tuple[nn.Module, str]]:
    """Returns the averages of adapted parts that callbacks of others hold, each with the name of its part."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    held = [value for callback in callbacks for value in vars(callback).values() if isinstance(value, AveragedModel)]
    found = [(each.module, _name_of_original(each.module, module)) for each in held]
    return [(average, name) for average, name in found if name is not None]


def _name_of_original(average: nn.Module, module: LightningModule) -> str | None:
    """Returns the name of the part that something is the average of; None if it is of none."""
    return next((name for name, part in module.named_modules() if _is_average(average, part)), None)


def _is_average(average: nn.Module, part: nn.Module) -> bool:
    """Whether one has the class of the other, the same names, and what is frozen but for rounding: a twin has not."""
    if type(average) is not type(part):
        return False
    its, own = dict(average.named_parameters()), dict(part.named_parameters())
    frozen = {name: tensor for name, tensor in own.items() if not tensor.requires_grad}
    return its.keys() == own.keys() and all(
        its[name].shape == tensor.shape and torch.allclose(its[name].to(tensor), tensor, rtol=0.1)
        for name, tensor in frozen.items()
    )


def _averaging(trainer: Trainer) -> list[Averaging]:
    found = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in found if isinstance(callback, WeightAveraging | StochasticWeightAveraging)]
