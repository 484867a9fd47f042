"""Merging for good: the updates go into the weights, and the adapters off the model, one layer after the other."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins.adapter.state import ModelState, adapted_layers, close_state
from lora_plugins.inplace.layer import STATE, AdapterTensors, layer_state, weight_names
from lora_plugins.inplace.modules import full_name
from lora_plugins.inplace.parametrized import make_plain, remover
from lora_plugins.merge.delta import place_of, weight_updates
from lora_plugins.merge.merge import checked
from lora_plugins.spare_memory import SpareMemory


@torch.no_grad()
def merge_for_good(model: nn.Module, state: ModelState, max_error: float) -> None:
    """Writes the updates of all active adapters into the weights and takes all adapters off the model.

    One layer after the other, so that the model is not in memory twice, and such that it computes the same between any
    two steps. Stopped in the middle, it can be called again. A weight goes where an untouched one of its size was, of a
    layer that is done, if nothing else uses that.

    Raises:
        MergeError: As `merge` does, or if a weight is computed in an unknown way.
    """
    layers = adapted_layers(model)
    adapters = tuple(name for name in state.active if name not in state.merged)
    checked(model, layers, state, adapters, max_error)
    _refuse_unknown(layers, adapters)
    spare = SpareMemory()
    for group in _sharing(layers):
        merged = {
            place_of(update.layer, update.tensor): spare.move(update.merged())
            for update in weight_updates(group, adapters)
        }
        state.leaving, state.kept = True, {}
        for layer in group.values():
            _answer_with(layer, merged)
        for layer in group.values():
            untouched = _untouched(layer)
            leave(layer)
            spare.keep(untouched)
    close_state(model)


def _untouched(layer: nn.Module) -> list[Tensor]:
    """Returns the weights that a layer is about to replace by merged ones."""
    parameters = [layer._parameters.get(name) for name in layer_state(layer).merged]
    return [parameter.data for parameter in parameters if parameter is not None]


def _answer_with(layer: nn.Module, merged: Mapping[object, Tensor]) -> None:
    """Makes a layer use merged weights in place of its updates, in one assignment."""
    state = layer_state(layer)
    own = {name: merged[place] for name in weight_names(state) if (place := place_of(layer, name)) in merged}
    layer.__dict__[STATE] = replace(state, merged={**state.merged, **own}, active=(), branch=None)


def leave(layer: nn.Module) -> None:
    """Takes all adapters off a layer, whose merged weights stay; may be done again from any step."""
    state, computed = layer_state(layer), {}
    for name, value in state.merged.items():
        parameter = layer._parameters.get(name)
        if parameter is None:
            computed[name] = value
        else:
            parameter.data = value
    layer.__class__ = cast(Any, state.base_class)
    for name in [name for name, child in layer._modules.items() if isinstance(child, AdapterTensors)]:
        del layer._modules[name]
    for name, value in computed.items():
        make_plain(layer, name, value)
    del layer.__dict__[STATE]


def _places(layer: nn.Module) -> set[object]:
    return {place_of(layer, tensor) for tensor in weight_names(layer_state(layer))}


def _sharing(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Returns the layers that share weights with others, together, and then each of the others.

    The largest of them first: where the memory for one more is missing, nothing has changed yet.
    """
    places = {name: _places(layer) for name, layer in layers.items()}
    uses = Counter(place for own in places.values() for place in own)
    shared = {name: layer for name, layer in layers.items() if any(uses[place] > 1 for place in places[name])}
    others = sorted((name for name in layers if name not in shared), key=lambda name: -_size(layers[name]))
    single = [{name: layers[name]} for name in others]
    return [shared, *single] if shared else single


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer._parameters.values() if parameter is not None)


def _refuse_unknown(layers: Mapping[str, nn.Module], adapters: tuple[str, ...]) -> None:
    """Refuses weights that are computed in a way that nobody could end."""
    for name, layer in layers.items():
        state = layer_state(layer)
        changing = {slot.tensor for a in adapters if a in state.active for slot in state.adapters[a].slots}
        for tensor in sorted(changing | state.merged.keys()):
            if layer._parameters.get(tensor) is None:
                remover(layer, tensor, full_name(name, tensor))
