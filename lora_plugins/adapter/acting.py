"""Applies the state of the adapters to a model: to its layers, values, norm statistics and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lora_plugins.adapter.attach import activate, named_adapter_parameters
from lora_plugins.adapter.gradients import forget_freed, require_gradient
from lora_plugins.adapter.state import ModelState, adapted_among, present_state
from lora_plugins.inplace import (
    NamedModule,
    freeze,
    full_name,
    layer_state,
    mix_rows,
    model_modules,
    own_buffers,
    own_parameters,
    thaw,
    unmix_rows,
)


def apply_state(model: nn.Module, state: ModelState) -> None:
    """Applies the state outside of blocks to layers, values, norm statistics and gradients."""
    modules = model_modules(model)
    state.values.activate(model, state.active, lasting=True)
    apply_acting(modules, state)
    _apply_gradients(modules, state)


def apply_acting(modules: list[NamedModule], state: ModelState) -> None:
    """Applies what acts now, the innermost block or else the active adapters, to layers and norm statistics."""
    acting = state.acting
    for entry in modules:
        unmix_rows(entry.module)
    for layer in adapted_among(modules).values():
        activate(layer, acting.adapters, acting.rows, {} if state.blocks else state.weights)
        layer_state(layer).meanwhile = "in a block" if state.blocks else "merged" if state.merged else ""
    _apply_norms(modules, state)
    if acting.rows is not None:
        mix_rows(modules, acting.rows, values_by_tensor(modules, state, acting.adapters))


def values_by_tensor(
    modules: list[NamedModule], state: ModelState, adapters: tuple[str, ...]
) -> dict[str | None, dict[int, Tensor]]:
    """Returns the own values of adapters, by the identity of the model's tensors."""
    tensors = own_parameters(modules) | own_buffers(modules)
    own = {name: state.values.of(name) for name in adapters}
    return {
        name: {id(tensors[key]): values[key].to(tensors[key].device) for key in values}
        for name, values in own.items()
        if values
    }


@contextmanager
def base_in_place(model: nn.Module, state: ModelState) -> Iterator[None]:
    """Restores the base's values of the model's own tensors for the duration of the block."""
    state.values.activate(model, ())
    try:
        yield
    finally:
        state.values.activate(model, _owners(state))


def _owners(state: ModelState) -> tuple[str, ...]:
    """Returns the adapters whose values of the model's own tensors are in place."""
    return () if state.blocks else state.active


def freeze_new_norms(model: nn.Module) -> None:
    """Freezes the statistics of norms that other code has put in the place of frozen ones."""
    _apply_norms(model_modules(model), present_state(model))


def norms_to_freeze(state: ModelState) -> set[str]:
    """Returns the names of the normalization layers that all active adapters freeze.

    In a block, and where none is active, those that all adapters of the model freeze.
    """
    frozen = [set(state.adapters[name].plan.frozen_norms) for name in _owners(state) or state.adapters]
    return set.intersection(*frozen) if frozen else set()


def _apply_norms(modules: list[NamedModule], state: ModelState) -> None:
    frozen = norms_to_freeze(state)
    for entry in modules:
        if entry.name in frozen:
            freeze(entry.module)
        else:
            thaw(entry.module)


def _apply_gradients(modules: list[NamedModule], state: ModelState) -> None:
    trained = state.unmerged if state.trainable else ()
    names = {name for adapter in trained for name in state.adapters[adapter].plan.trained}
    layers = adapted_among(modules)
    own_values = {name for adapter in state.adapters.values() for name in adapter.plan.trained}
    for name, parameter in own_parameters(modules).items():
        if name in own_values or name.rpartition(".")[0] in layers:
            state.requires_grad.setdefault(name, parameter.requires_grad)
        if name in state.requires_grad:  # else it was built since, and is the author's own
            require_gradient(parameter, name in names, state.guards, name)
    for name, layer in layers.items():
        for adapter in state.adapters:
            for key, factor in named_adapter_parameters(layer, adapter):
                require_gradient(factor, adapter in trained, state.guards, full_name(name, key))
    forget_freed(state.guards)
