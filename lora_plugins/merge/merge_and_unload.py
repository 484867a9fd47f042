"""Permanent merging: updates are written into the weights and adapters removed, one layer after the other."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_plugins.adapter import ModelState, adapted_layers, check_here, close_state, leave_inference
from lora_plugins.inplace import (
    STATE,
    full_name,
    layer_state,
    make_dense,
    remover,
    stored_weight,
    stored_weights,
    strip_adapters,
)
from lora_plugins.merge.merge_adapter import checked
from lora_plugins.merge.storing_again import check_storing
from lora_plugins.merge.weight_delta import place_of, weight_deltas


@torch.no_grad()
def merge_and_unload(model: nn.Module, state: ModelState, max_error: float, *, dequantize: bool) -> None:
    """Writes the updates of all active adapters into the weights and removes all adapters from the model.

    One layer after the other, so that the model is not in memory twice, and such that it computes the same between any
    two steps. Stopped in the middle, it can be called again. Stored weights become dense ones, or their merged values
    are stored again.

    Raises:
        MergeError: As `merge` does, or if a weight is computed in an unknown way.
        StateError: If parameters of the model were made in inference mode.
    """
    check_here(model, "merge_and_unload")
    leave_inference(model)
    layers = adapted_layers(model)
    adapters = state.unmerged
    checked(model, layers, state, adapters, max_error)
    _check_computed(layers, adapters)
    if not dequantize:
        check_storing(layers, adapters, max_error)
    for group in _groups(layers):
        merged = {place_of(delta.layer, delta.tensor): delta.effective() for delta in weight_deltas(group, adapters)}
        state.leaving = True
        for layer in group.values():
            _answer_with(layer, merged)
        for layer in group.values():
            strip_adapters(layer, dequantize=dequantize)
    if dequantize:
        make_dense(model)
    close_state(model)


def _answer_with(layer: nn.Module, merged: Mapping[object, Tensor]) -> None:
    """Lets a layer use merged weights in place of its updates, by a single assignment."""
    state = layer_state(layer)
    own = {name: merged[place] for name in state.weight_names if (place := place_of(layer, name)) in merged}
    layer.__dict__[STATE] = replace(state, merged={**state.merged, **own}, active=(), branch=None)


def _groups(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Returns the layers that share weights with others, together, and then each of the others.

    The largest of them first: where the memory for one more is missing, nothing has changed yet.
    """
    places = {
        name: {place_of(layer, tensor) for tensor in layer_state(layer).weight_names} for name, layer in layers.items()
    }
    uses = Counter(place for own in places.values() for place in own)
    shared = {name: layer for name, layer in layers.items() if any(uses[place] > 1 for place in places[name])}
    others = sorted((name for name in layers if name not in shared), key=lambda name: -_size(layers[name]))
    single = [{name: layers[name]} for name in others]
    return [shared, *single] if shared else single


def _size(layer: nn.Module) -> int:
    stored = sum(weight.shape.numel() for weight in stored_weights(layer).values())
    return stored + sum(parameter.numel() for parameter in layer._parameters.values() if parameter is not None)


def _check_computed(layers: Mapping[str, nn.Module], adapters: tuple[str, ...]) -> None:
    """Refuses weights that are computed in an unknown way."""
    for name, layer in layers.items():
        state = layer_state(layer)
        changing = {slot.tensor for a in adapters if a in state.active for slot in state.adapters[a].slots}
        for tensor in sorted(changing | state.merged.keys()):
            if layer._parameters.get(tensor) is None and stored_weight(layer, tensor) is None:
                remover(layer, tensor, full_name(name, tensor))
