"""Callbacks that average weights: they copy the module in `setup`, before it is adapted, and keep the copy."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

from lora_plugins import StateError
from lora_plugins.adapter import adapter_tensors
from lora_plugins.inplace import full_name, named_parameters, named_tensors
from lora_plugins.integrations.lightning.module import (
    frozen_as_built,
    frozen_tensors,
    outside,
)
from lora_plugins.integrations.lightning.shims import Averaging, averaged_module, callbacks_of, drop_average
from lora_plugins.integrations.lightning.strategies import is_sharded
from lora_plugins.utils import plain_name

_AVERAGING_METHODS = {"update_parameters", "update_ema"}
"""Methods by which callbacks average a bare copy themselves."""


def copy_into_averages(trainer: Trainer, module: LightningModule) -> None:
    """Lets averaging callbacks copy the module as it is now, by calling their `setup` again."""
    stage = trainer.state.fn
    assert stage is not None
    for callback in _averaging(trainer):
        drop_average(callback, module)
        callback.setup(trainer, module, stage.value)


def keep_base_of_averages(trainer: Trainer, module: LightningModule, note_moved: Callable[[], None]) -> None:
    """Restores the frozen base in averages: the average of equal values differs from them by rounding.

    Callbacks exchange their average with the module in validation and when training ends, so this is called before.
    `note_moved` records what of the base the module has moved by hand: these values are averaged like trained ones.
    """
    averages = [(average, "") for average in _averages(trainer)] + _of_other_callbacks(trainer, module)
    if not averages:
        return
    note_moved()
    frozen = _frozen(module)
    with torch.no_grad():
        for average, path in averages:
            named = {full_name(path, name): tensor for name, tensor in named_tensors(average).items()}
            for name in filter(named.__contains__, frozen):  # in one order, as all processes of a run have it
                named[name].copy_(frozen[name])


def put_back_statistics(trainer: Trainer, module: LightningModule) -> None:
    """Restores statistics of frozen norms that SWA has cleared: its pass over the data would not renew them."""
    if not renews_statistics(trainer):
        return
    frozen = _frozen(module)
    kept = {plain_name(name): buffer for average in _averages(trainer) for name, buffer in average.named_buffers()}
    with torch.no_grad():
        for name in frozen.keys() & kept.keys():
            frozen[name].copy_(kept[name])


def check_averages(trainer: Trainer, module: LightningModule) -> None:
    """Checks that third-party callbacks made their averages of adapted parts after these were adapted.

    What averages pairs parameters by position: without A and B in the copy, they do not belong together.

    Raises:
        StateError: If one was made before.
    """
    for callback in _comparable(trainer):
        for name, value in vars(callback).items():
            if any(_is_plain_copy(copy, module) for copy in _averaged_by(callback, value)):
                raise StateError(
                    f"{type(callback).__name__}.{name} ({type(value).__name__}) holds a copy of weights of "
                    f"{type(module).__name__} that was made before there were adapters. It has no A and B, and an "
                    "average would mix parameters that do not belong together. Make it in on_fit_start, where the "
                    "module is adapted."
                )


def drop_averages(trainer: Trainer, module: LightningModule) -> None:
    """Drops the copies of averaging callbacks when `fit` ends with a merge: they are no copies of what is merged."""
    for callback in _averaging(trainer):
        drop_average(callback, module)


def start_averages_from(trainer: Trainer, module: LightningModule) -> None:
    """Gives averages the module's values, the best ones say: validation exchanges them, and checkpoints hold both."""
    with torch.no_grad():
        for average in _averages(trainer):
            held, new = ([*part.parameters(), *part.buffers()] for part in (average, module))
            for tensor, value in zip(held, new, strict=True):
                tensor.copy_(value)


def renews_statistics(trainer: Trainer) -> bool:
    """Whether the epoch trains nothing: after averaging, SWA passes over the data only for the statistics of norms."""
    swa = [callback for callback in callbacks_of(trainer) if isinstance(callback, StochasticWeightAveraging)]
    return any(trainer.current_epoch == callback.swa_end + 1 for callback in swa)


def _frozen(module: LightningModule) -> dict[str, Tensor]:
    """Returns what is frozen in the targets, and beside them."""
    beside, built = outside(module), frozen_as_built(module)
    return {**frozen_tensors(module), **{name: beside[name] for name in built}}


def _is_plain_copy(copy: nn.Module, module: LightningModule) -> bool:
    """Whether something is a copy of a part with adapters, without these."""
    for part in module.modules():
        factors = adapter_tensors(part).keys() if isinstance(part, type(copy)) else ()
        own = named_parameters(part)
        if factors and _agree(copy, {name: own[name] for name in own.keys() - factors}):
            return True
    return False


def _averaged_by(callback: Callback, value: Any) -> Iterator[nn.Module]:
    """Yields modules that a callback averages.

    Those are in an attribute with an `update...` method, as AveragedModel and ModelEmaV3 have, which is no metric; or a
    bare copy, if the callback itself has `update_parameters` or `update_ema`. Other methods of a callback do not count:
    one that keeps a teacher may update a temperature.
    """
    if isinstance(value, nn.Module) and not _AVERAGING_METHODS.isdisjoint(dir(type(callback))):
        yield value
    if isinstance(value, type | LightningModule | Metric) or not any(
        name.startswith("update") for name in dir(type(value))
    ):
        return
    held = value.children() if isinstance(value, nn.Module) else getattr(value, "__dict__", {}).values()
    yield from (each for each in held if isinstance(each, nn.Module))


def _of_other_callbacks(trainer: Trainer, module: LightningModule) -> list[tuple[nn.Module, str]]:
    """Returns the averages of adapted parts that callbacks hold beside Lightning's, each with the name of its part."""
    known, values = _averages(trainer), [each for callback in _comparable(trainer) for each in vars(callback).values()]
    held = [each.module for each in values if isinstance(each, AveragedModel) and each.module not in known]
    found = [(average, _name_of_original(average, module)) for average in held]
    return [(average, name) for average, name in found if name is not None]


def _name_of_original(average: nn.Module, module: LightningModule) -> str | None:
    """Returns the name of the part that a module is the average of; None if it is of none.

    It has the class, names and, up to rounding, frozen values of that part, which a mere twin has not.
    """
    alike = ((name, part) for name, part in module.named_modules() if type(part) is type(average))
    return next((plain_name(name) for name, part in alike if _agree(average, named_parameters(part))), None)


def _agree(copy: nn.Module, own: Mapping[str, nn.Parameter]) -> bool:
    """Whether a module has parameters of these names and shapes, and the frozen ones up to rounding."""
    its = named_parameters(copy)
    return its.keys() == own.keys() and all(
        its[name].shape == tensor.shape
        and (tensor.requires_grad or torch.allclose(its[name].to(tensor), tensor, rtol=0.1))
        for name, tensor in own.items()
    )


def _averages(trainer: Trainer) -> list[nn.Module]:
    """Returns the copies of the module that callbacks average."""
    found = [averaged_module(callback) for callback in _comparable(trainer) if isinstance(callback, Averaging)]
    return [average for average in found if average is not None]


def _averaging(trainer: Trainer) -> list[Averaging]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Averaging)]


def _comparable(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks whose averages can be compared with the module: none where no process has it whole."""
    return [] if is_sharded(trainer) else callbacks_of(trainer)
