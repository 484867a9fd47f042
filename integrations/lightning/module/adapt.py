"""Puts an adapter on the module of a run, or reuses the one that it has."""

from collections.abc import Container

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import Calibration, ConfigError, LoraConfig, LoraModel, StateError
from lora_plugins.adapter import check_same, model_state, present_state, whole
from lora_plugins.errors import counted, listing, near
from lora_plugins.inplace import model_modules, modules_by_name, state_of
from lora_plugins.integrations.lightning.module.adapted_parts import adapted_targets
from lora_plugins.utils import plain_name


def find_target(module: nn.Module, path: str | None) -> nn.Module:
    """Returns the submodule of that name, or without a name the module itself.

    Raises:
        ConfigError: If there is none.
    """
    if path is None:
        return module
    found = modules_by_name(module)
    path = plain_name(path)
    if path not in found:
        raise ConfigError(f"target is {path!r}, which {type(module).__name__} does not have. {near(path, found)}")
    return found[path]


def add_adapter(target: nn.Module, name: str, config: LoraConfig, data: Calibration | None) -> None:
    """Adds an adapter and activates it beside those that are active.

    Raises:
        TargetError: If the configuration does not fit.
        StateError: If it cannot be active beside them. The target is unchanged.
    """
    if model_state(target) is None:
        LoraModel(target, config, name, init_data=data)
        return
    lora = LoraModel(target)

    def add() -> None:
        lora.add_adapter(name, config, init_data=data)
        lora.set_adapter((*lora.active_adapters, name), weights=(*lora.active_weights.values(), 1.0))

    whole(target, add)


def reuse_adapter(target: nn.Module, name: str, config: LoraConfig) -> None:
    """Prepares an adapter of the module for training: unmerged and active, with its base frozen again.

    Raises:
        StateError: If its configuration is another, or its layers were replaced.
    """
    check_same(present_state(target), name, config)
    lora = LoraModel(target)
    if lora.merged_adapters:
        lora.unmerge_adapter()
    active = lora.active_weights
    active.setdefault(name, 1.0)
    lora.set_adapter([*active], weights=[*active.values()])  # a former run may have left gradients switched on
    check_not_replaced(target, name)


def warn_of_others(target: nn.Module, names: Container[str]) -> None:
    """Names active adapters that are none of a run's, which are trained and merged with its own.

    Its adapter folders do not have them, so what is loaded from those computes something else.
    """
    others = [name for name in LoraModel(target).active_adapters if name not in names]
    if others:
        rank_zero_warn(
            f"No LoraCallback of this fit has the name of {counted(len(others), 'active adapter')} of "
            f"{type(target).__name__}: {listing(others)}. The fit trains and merges what is active, and "
            "save_adapter_to of its callbacks writes only their own. Give it a LoraCallback of that adapter_name as "
            "well; or take what it learned into the base before, LoraModel(...).merge_and_unload(), or off, "
            "delete_adapter."
        )


def lost_layers(target: nn.Module, name: str) -> list[str]:
    """Returns the names of adapted layers that are no longer in the module."""
    found = {entry.name: entry.module for entry in model_modules(target)}
    return [
        layer.name
        for layer in LoraModel(target).plans[name].layers
        if layer.name not in found or (state := state_of(found[layer.name])) is None or name not in state.adapters
    ]


def check_not_replaced(target: nn.Module, name: str) -> None:
    """Checks that the layers which an adapter adapts are still in the module, and the heads that it trains.

    Raises:
        StateError: If some were replaced, naming them.
    """
    lost = lost_layers(target, name)
    if lost:
        raise StateError(
            f"{counted(len(lost), 'adapted layer was', 'adapted layers were')} replaced by others: {listing(lost)}. A "
            "precision plugin that swaps layers, or a setup() or configure_model() that builds the model again, does "
            "that. Build the layers once, and convert them before fit."
        )
    values = present_state(target).values
    heads = [tensor for tensor in values.replaced(target) if tensor in values.of(name)]
    if heads:
        raise StateError(
            f"{listing(heads)}: gone, or of another shape than when the module was adapted, so the adapter {name!r} "
            "could not be saved. A head was replaced, as one that grows, or it was pruned or parametrized: do that "
            "before fit. Where an earlier fit left the module adapted, LoraModel(...).merge_and_unload() of the target "
            "keeps what was learned, and the next fit adapts it anew."
        )


def check_not_nested(module: nn.Module, path: str | None) -> None:
    """Checks that no adapted target lies in or around the one at `path`: a layer would have two sets of adapters.

    Raises:
        StateError: If one does, with the names of the two.
    """
    target = find_target(module, path)
    for there, other in adapted_targets(module).items():
        if other is target:
            continue
        if any(child is target for child in other.modules()) or any(child is other for child in target.modules()):
            raise StateError(
                f"The targets {path or 'the module'!r} and {there or 'the module'!r} lie inside one another. Give all "
                "LoraCallbacks the same target, and different adapter_names, or targets side by side."
            )
