"""Putting an adapter onto the module of a run, or taking up the one that it has."""

import dataclasses
from collections.abc import Sequence
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, Observations, StateError
from lora_plugins.adapter.state import model_state
from lora_plugins.errors import listing, near
from lora_plugins.inplace.layer import state_of
from lora_plugins.integrations.lightning.checkpoint.content import adapted_targets


def target_of(module: nn.Module, path: str | None) -> nn.Module:
    """Returns the submodule of that name, or without a name the module itself.

    Raises:
        ConfigError: If there is none.
    """
    if path is None:
        return module
    found = dict(module.named_modules())
    if path not in found:
        raise ConfigError(f"target is {path!r}, which {type(module).__name__} does not have. {near(path, found)}")
    return cast(nn.Module, found[path])


def add(target: nn.Module, name: str, config: LoraConfig, data: Observations | None) -> None:
    """Adds an adapter, active beside those that are there.

    Raises:
        TargetError: If the configuration does not fit.
    """
    if model_state(target) is None:
        LoraModel(target, config, name, init_data=data)
        return
    lora = LoraModel(target)
    lora.add_adapter(name, config, init_data=data)
    lora.set_adapter((*lora.active_adapters, name))


def reuse(target: nn.Module, name: str, config: LoraConfig) -> None:
    """Makes an adapter that is there ready to be trained.

    Raises:
        StateError: If its configuration is another, or its layers were replaced.
    """
    lora = LoraModel(target)
    present = lora.adapters[name]
    different = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(present, f.name)]
    if different:
        raise StateError(
            f"The module has an adapter {name!r} already, with another configuration: {listing(different)} differ. "
            "Choose another adapter_name, or take the old one off first: LoraModel(module).unload()."
        )
    if lora.merged_adapters:
        lora.unmerge_adapter()
    if name not in lora.active_adapters:
        lora.set_adapter((*lora.active_adapters, name))
    refuse_replaced(target, name)


def refuse_replaced(target: nn.Module, name: str) -> None:
    """Refuses a module whose adapted layers somebody replaced.

    Raises:
        StateError: With the names of the layers.
    """
    found = dict(target.named_modules())
    lost = [
        layer.name
        for layer in LoraModel(target).plans[name].layers
        if layer.name not in found or (state := state_of(found[layer.name])) is None or name not in state.adapters
    ]
    if lost:
        raise StateError(
            f"{len(lost)} adapted layers were replaced by others after they were adapted: {listing(lost)}. A "
            "precision plugin that swaps layers, or a setup() that builds the model again, does that. Build the "
            "layers once, and convert them before fit."
        )


def refuse_nested(module: nn.Module, path: str | None) -> None:
    """Refuses targets that lie inside one another: a layer would have two sets of adapters.

    Args:
        module: The module.
        path: Name of the submodule that is about to be adapted; None for the module itself.

    Raises:
        StateError: With the names of the two.
    """
    target = target_of(module, path)
    for there, other in adapted_targets(module).items():
        if other is target:
            continue
        if any(child is target for child in other.modules()) or any(child is other for child in target.modules()):
            raise StateError(
                f"The targets {path or 'the module'!r} and {there or 'the module'!r} lie inside one another. Give all "
                "LoraCallbacks the same target, and different adapter_names, or targets side by side."
            )


def copy_again(trainer: Trainer, module: LightningModule) -> None:
    """Lets averaging callbacks copy the adapted module: they copied it in their setup, before it was adapted."""
    averaging: Sequence[Callback] = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging)
    ]
    for callback in averaging:
        callback.setup(trainer, module, "fit")


def into_training_mode(target: nn.Module) -> None:
    """Puts a module into training mode, frozen normalization layers aside, and says what that woke."""
    modes = {name: child.training for name, child in target.named_modules()}
    target.train()
    woken = [name for name, child in target.named_modules() if child.training and not modes[name]]
    if woken:
        rank_zero_info(
            f"{len(woken)} modules arrived in eval mode and were put into training mode: {listing(woken, 3)}. Use "
            "LoraCallback(train_mode=False) to leave them."
        )
