"""Warnings as an adapter is saved: of changes to the model that it does not hold, and of training without effect."""

import warnings

from torch import nn

from lora_plugins.adapter.moved_base import moved_base
from lora_plugins.adapter.state import ModelState
from lora_plugins.errors import listing
from lora_plugins.inplace import model_modules, own_parameters, slot_tensors, submodule
from lora_plugins.plan import Plan

_STACKLEVEL = 7
"""Of the line that calls `LoraModel.save_adapter`, behind its decorators."""


def warn_of_unsaved(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Warns of parameters that are trained and belong to no adapter, of other changed tensors, and of no training."""
    besides = _trained_besides(model, state)
    if besides:
        warnings.warn(
            f"{listing(besides, 3)} require a gradient and are no part of an adapter, so what was trained of them "
            "is not saved here, and the adapter may not load onto the base again. Name their modules in "
            "modules_to_save, and keep other code from unfreezing the rest; to keep this training, save the state "
            "dict, or merge.",
            stacklevel=_STACKLEVEL,
        )
    if moved := [name for name in moved_base(model, state, adapter) if name not in besides]:
        warnings.warn(
            f"The adapter does not hold {listing(moved, 3)}, which have changed since it was added: on the base as "
            "it was, it computes something else. Codebooks, queues and the like, which layers update themselves, "
            "belong in modules_to_save. Frozen weights that something wrote into are saved by the state dict, or by "
            "merging.",
            stacklevel=_STACKLEVEL,
        )
    if _waits_for_a_step(model, state.adapters[adapter].plan, adapter):
        warnings.warn(
            f"The adapter {adapter!r} still changes nothing, though all its layers have had gradients. An optimizer "
            "that was made before the adapter does not train it: make it afterwards, from the parameters that require "
            "a gradient.",
            stacklevel=_STACKLEVEL,
        )
    if _stands_still(model, state, adapter):
        warnings.warn(
            f"The adapter {adapter!r} still changes nothing, and none of its A and B requires a gradient, while what "
            "it trains in place does: only that is trained. Something froze them after they were added: let code that "
            "freezes the model run ahead of that.",
            stacklevel=_STACKLEVEL,
        )


def _waits_for_a_step(model: nn.Module, plan: Plan, adapter: str) -> bool:
    """Whether each layer has a factor that is all zeros, with a gradient that is not."""
    tensors = (slot_tensors(submodule(model, layer.name), adapter, slot) for layer, slot, _ in plan.slots())
    return all(any(_is_zero(each[name]) and _has_gradient(each[name]) for name in "AB") for each in tensors)


def _stands_still(model: nn.Module, state: ModelState, adapter: str) -> bool:
    """Whether each layer of an active adapter has a factor of zeros that is frozen, while heads or biases are not."""
    own, plan = own_parameters(model_modules(model)), state.adapters[adapter].plan
    if adapter not in state.active or not any(own[name].requires_grad for name in plan.trained if name in own):
        return False
    tensors = (slot_tensors(submodule(model, layer.name), adapter, slot) for layer, slot, _ in plan.slots())
    return all(
        not any(tensor.requires_grad for tensor in each.values()) and any(_is_zero(each[name]) for name in "AB")
        for each in tensors
    )


def _is_zero(parameter: nn.Parameter) -> bool:
    return not bool(parameter.detach().any())


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and not parameter.grad.is_sparse and bool(parameter.grad.any())


def _trained_besides(model: nn.Module, state: ModelState) -> list[str]:
    """Returns the names of parameters that require a gradient and belong to no adapter."""
    held = {name for adapter in state.adapters.values() for name in adapter.plan.trained}
    own = own_parameters(model_modules(model))
    return [name for name, parameter in own.items() if parameter.requires_grad and name not in held]
