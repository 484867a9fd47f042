"""Prepares a model for adapters, with an empty set of them and its hooks, and undoes it."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter.base_state_dict import accept_base
from lora_plugins.adapter.gradients import require_gradient
from lora_plugins.adapter.pretrained import restore_save, warn_on_save
from lora_plugins.adapter.state import MODEL_STATE, ModelState, model_state
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import (
    full_name,
    let_load,
    model_modules,
    own_mode,
    own_parameters,
    pin_attributes,
    state_of,
    thaw,
    unpin_attributes,
    unwrapped,
)

_OF_HOOKS = ("_orig", "_g", "_v")
"""What follows the name of a weight in those that hooks of torch compute it from: norms of weights, and pruning."""


def open_state(model: nn.Module) -> ModelState:
    """Returns the adapters of a model, after giving it an empty set of them if it has none.

    Raises:
        StateError: If it lies in an adapted model or has one in it: a layer would have two sets of adapters.
    """
    model = unwrapped(model)
    state = model_state(model)
    if state is None:
        check_not_nested(model)
        parameters = own_parameters(model_modules(model))
        state = ModelState(requires_grad={name: p.requires_grad for name, p in parameters.items()})
        model.__dict__[MODEL_STATE] = state
        # By torch's own methods: the modules of some packages have others of these names (otx).
        nn.Module.register_load_state_dict_pre_hook(model, accept_base)  # type: ignore[no-untyped-call]
        nn.Module.register_forward_pre_hook(model, _check_training)
        warn_on_save(model, state)
        for module in model.modules():
            pin_attributes(module)
    return state


def close_state(model: nn.Module) -> None:
    """Removes the set of adapters of a model, whose layers have none any more."""
    model = unwrapped(model)
    state = model_state(model)
    assert state is not None
    _remove_hook(model._load_state_dict_pre_hooks, accept_base)
    _remove_hook(model._forward_pre_hooks, _check_training)
    restore_save(model)
    modules = model_modules(model)
    for entry in modules:
        thaw(entry.module)
    for module in model.modules():
        unpin_attributes(module)
        let_load(module)
    for name, parameter in own_parameters(modules).items():
        require_gradient(parameter, _required(state, name, parameter), state.guards, name)
    del model.__dict__[MODEL_STATE]


def _required(state: ModelState, name: str, parameter: Tensor) -> bool:
    """Whether a parameter required a gradient before there were adapters, or what it was computed from, if it was.

    What was built since is as its author has it.
    """
    if name in state.requires_grad:
        return state.requires_grad[name]
    module, _, key = name.rpartition(".")
    parametrized = full_name(module, f"parametrizations.{key}.")
    hooked = {name + suffix for suffix in _OF_HOOKS}
    flags = [flag for other, flag in state.requires_grad.items() if other in hooked or other.startswith(parametrized)]
    return any(flags) if flags else parameter.requires_grad


def check_not_nested(model: nn.Module) -> None:
    """Checks that no layer of a model that has no adapters itself has some of another model.

    Raises:
        StateError: If the model lies in an adapted model or has one in it.
    """
    inner = [entry.name for entry in model_modules(model) if model_state(entry.module) is not None]
    if inner:
        raise StateError(
            f"{listing(inner)} in this model {'has' if len(inner) == 1 else 'have'} adapters already, whose handle is "
            f"LoraModel(model.get_submodule({inner[0]!r})). For adapters of the whole model, unload() those first."
        )
    if any(state_of(module) is not None for module in model.modules()):
        raise StateError(
            "This model is a part of an adapted one, and shares its layers, or it was copied from such a part. Use the "
            "LoraModel of the whole model; unload() takes its adapters off. For a copy that can be changed, copy the "
            "whole model and take the part from that copy."
        )


def _check_training(model: nn.Module, _: Any) -> None:
    state = model_state(model)
    if state is not None and own_mode(model) and (torch.is_grad_enabled() or state.acting.rows is not None):
        state.check("train")


def _remove_hook(hooks: dict[int, Any], function: Any) -> None:
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is function:
            del hooks[key]
