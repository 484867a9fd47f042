"""What an adapted model carries with it, so that a copy or a pickle of the model is adapted as well."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter.attach import activate, adapter_parameters, adapter_tensors
from lora_plugins.adapter.owned_tensors import InPlaceValues
from lora_plugins.errors import StateError, listing, near
from lora_plugins.inplace.frozen_norm import freeze, thaw
from lora_plugins.inplace.layer import state_of
from lora_plugins.inplace.modules import model_modules, own_tensors
from lora_plugins.plan.plan import Plan

MODEL_STATE = "_lora_model"
"""Attribute of an adapted model that holds its `ModelState`."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model.

    Args:
        plan: What it adapts.
        recipes: By layer name and slot suffix, what its init needs to change the base again.
        fingerprints: Of the untouched weights by full name; filled when first needed, since the base stands still.
    """

    plan: Plan
    recipes: Mapping[tuple[str, str], Mapping[str, Tensor]]
    fingerprints: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class ModelState:
    """All adapters of a model and which of them act.

    Args:
        adapters: The adapters by name.
        active: Those whose update acts, in order; merged ones included.
        merged: Those of the active ones whose update is in the weights.
        trainable: Whether active adapters are trained.
        kept: The untouched weights while something is merged, by full name.
        values: The model's own tensors that depend on the active adapter.
        requires_grad: Which parameters of the untouched model required a gradient.
        leaving: Whether a merge for good has begun: some layers may have left already.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    trainable: bool = True
    kept: dict[str, Tensor] = field(default_factory=dict)
    values: InPlaceValues = field(default_factory=InPlaceValues)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    leaving: bool = False

    def adapter(self, name: str) -> Adapter:
        """Returns an adapter by name.

        Raises:
            StateError: If there is none of that name.
        """
        if name not in self.adapters:
            raise StateError(f"The model has no adapter {name!r}. {near(name, self.adapters)}")
        return self.adapters[name]

    def refuse_merged(self, doing: str) -> None:
        """Raises a StateError if something is merged.

        Args:
            doing: What is not possible then, for the message.
        """
        self.refuse_leaving(doing)
        if self.merged:
            raise StateError(
                f"{doing} is not possible while {listing(self.merged)} is merged. Call unmerge_adapter() first."
            )

    def refuse_leaving(self, doing: str) -> None:
        """Raises a StateError if a merge for good was stopped in the middle.

        Args:
            doing: What is not possible then, for the message.
        """
        if self.leaving:
            raise StateError(
                f"{doing} is not possible: merge_and_unload() was stopped when some layers were merged for good. Call "
                "it again to merge the others."
            )


def model_state(model: nn.Module) -> ModelState | None:
    """Returns the adapters of a model; None if it has none."""
    state: ModelState | None = model.__dict__.get(MODEL_STATE)  # not a cast: torch.compile of 2.8 knows no `X | None`
    return state


def open_state(model: nn.Module) -> ModelState:
    """Returns the adapters of a model, after giving it an empty set of them if it has none."""
    state = model_state(model)
    if state is None:
        parameters = own_tensors(model, model_modules(model), "_parameters")
        state = ModelState(requires_grad={name: p.requires_grad for name, p in parameters.items()})
        model.__dict__[MODEL_STATE] = state
        model.register_load_state_dict_pre_hook(_accept_base_checkpoint)  # type: ignore[no-untyped-call]
        model.register_forward_pre_hook(_refuse_training_while_merged)
    return state


def close_state(model: nn.Module) -> None:
    """Removes the set of adapters of a model, whose layers have none any more."""
    state = model_state(model)
    assert state is not None
    _remove_hook(model._load_state_dict_pre_hooks, _accept_base_checkpoint)
    _remove_hook(model._forward_pre_hooks, _refuse_training_while_merged)
    modules = model_modules(model)
    for entry in modules:
        thaw(entry.module)
    for name, parameter in own_tensors(model, modules, "_parameters").items():
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    del model.__dict__[MODEL_STATE]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that have an adapter, by name."""
    return {entry.name: entry.module for entry in model_modules(model) if state_of(entry.module) is not None}


def apply_state(model: nn.Module, state: ModelState) -> None:
    """Makes layers, values, norm statistics and gradients what the state says."""
    state.values.activate(model, state.active)
    unmerged = tuple(name for name in state.active if name not in state.merged)
    for layer in adapted_layers(model).values():
        activate(layer, unmerged)
    _apply_norms(model, state)
    _apply_gradients(model, state, unmerged if state.trainable else ())


@contextmanager
def base_in_place(model: nn.Module, state: ModelState) -> Iterator[None]:
    """Puts the base's values of the model's own tensors in place for the time of the block."""
    state.values.activate(model, ())
    try:
        yield
    finally:
        state.values.activate(model, state.active)


@contextmanager
def without_adapters(model: nn.Module, state: ModelState) -> Iterator[None]:
    """Makes the model the base for the time of the block, and then all what it was, `requires_grad` included."""
    active, state.active = state.active, ()
    grads = [(p, p.requires_grad) for p in model.parameters()]
    apply_state(model, state)
    try:
        yield
    finally:
        state.active = active
        apply_state(model, state)
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def _apply_norms(model: nn.Module, state: ModelState) -> None:
    frozen = [set(state.adapters[name].plan.frozen_norms) for name in state.active or state.adapters]
    keep = set.intersection(*frozen) if frozen else set()
    for entry in model_modules(model):
        if entry.name in keep:
            freeze(entry.module)
        else:
            thaw(entry.module)


def _apply_gradients(model: nn.Module, state: ModelState, trained: tuple[str, ...]) -> None:
    names = {name for adapter in trained for name in state.adapters[adapter].plan.trained}
    for name, parameter in own_tensors(model, model_modules(model), "_parameters").items():
        parameter.requires_grad_(name in names)
    for layer in adapted_layers(model).values():
        for adapter in state.adapters:
            for parameter in adapter_parameters(layer, adapter):
                parameter.requires_grad_(adapter in trained)


def _accept_base_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a state dict of the untouched model load strictly: adapters that it does not mention keep their values."""
    state = model_state(model)
    if state is None:
        return
    state.refuse_merged("Loading a state dict")
    tensors = {prefix + name: tensor for name, tensor in adapter_tensors(model).items()}
    if not tensors.keys() & state_dict.keys():
        state_dict.update(tensors)


def _refuse_training_while_merged(model: nn.Module, _: Any) -> None:
    state = model_state(model)
    if state is not None and model.training and torch.is_grad_enabled():
        state.refuse_merged("Training")


def _remove_hook(hooks: dict[int, Any], function: Any) -> None:
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is function:
            del hooks[key]
