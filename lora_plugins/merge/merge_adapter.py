"""Reversible merging: the updates of active adapters are written into the weights, and taken back bit for bit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_plugins.adapter import (
    ModelState,
    adapted_layers,
    apply_state,
    check_complete,
    check_here,
    check_names,
    check_shared,
)
from lora_plugins.errors import MergeError, StateError, counted, listing
from lora_plugins.inplace import LostWeightError, foreign_kind, layer_state, recompute
from lora_plugins.merge.weight_delta import place_of, weight_deltas
from lora_plugins.plugins import PLAIN
from lora_plugins.utils import put_value

DEFAULT_MAX_ERROR = 0.1
"""Share of an update's norm that a merge may lose to rounding without being told to."""


@dataclass(frozen=True)
class MergedWeight:
    """One weight that took an update.

    Args:
        name: Full name of the weight.
        relative_error: Norm of what rounding changed of the update, over the norm of the update; 0 for no update.
            Where half a unit in the last place of every element is too little to matter, that bound is given.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        adapters: The adapters that were merged.
        weights: The weights that changed.
    """

    adapters: tuple[str, ...]
    weights: tuple[MergedWeight, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((weight.relative_error for weight in self.weights), default=0.0)

    def __str__(self) -> str:
        if not self.adapters:
            return "merged nothing: every active adapter is merged already, or none is active"
        return (
            f"merged {listing(self.adapters)} into {counted(len(self.weights), 'weight')}, "
            f"relative error at most {self.worst:.1e}"
        )


@torch.no_grad()
def merge(model: nn.Module, state: ModelState, adapters: tuple[str, ...], max_error: float) -> MergeReport:
    """Writes the updates of adapters into the weights and keeps the untouched weights.

    Raises:
        StateError: If one of the adapters is not active, or merged already.
        MergeError: If a weight is shared with a layer that is not adapted, or rounding would lose too much.
    """
    check_here(model, "merge_adapter")
    layers = adapted_layers(model)
    report = checked(model, layers, state, adapters, max_error)
    merged = [(delta, delta.effective()) for delta in weight_deltas(layers, adapters)]
    sharing = _sharing(layers)
    for delta, weight in merged:
        parameter = delta.layer._parameters.get(delta.tensor)
        holders = [(layer_state(layer), tensor) for layer, tensor in sharing[place_of(delta.layer, delta.tensor)]]
        if parameter is None or foreign_kind(parameter) is not None:
            for own, tensor in holders:
                own.merged[tensor] = weight
        else:
            untouched = parameter.data
            for own, tensor in holders:
                own.kept.setdefault(tensor, untouched)
            put_value(parameter, weight)
    state.merged = (*state.merged, *adapters)
    apply_state(model, state)
    return report


def unmerge(model: nn.Module, state: ModelState) -> None:
    """Puts the kept weights back, bit for bit; layers that were replaced meanwhile stay as they are.

    Raises:
        StateError: If nothing is merged, or a weight was taken away or is offloaded: it would come back.
    """
    state.check("unmerge_adapter")
    if not state.merged:
        raise StateError("Nothing is merged.")
    check_here(model, "unmerge_adapter")
    for layer in adapted_layers(model).values():
        own = layer_state(layer)
        for name, weight in own.kept.items():
            parameter = layer._parameters.get(name)
            if parameter is None:
                raise LostWeightError(layer, name)
            put_value(parameter, weight.to(parameter))
        own.kept.clear()
        own.merged.clear()
    state.merged = ()
    apply_state(model, state)


def checked(
    model: nn.Module, layers: Mapping[str, nn.Module], state: ModelState, adapters: tuple[str, ...], max_error: float
) -> MergeReport:
    """Refuses what cannot be merged, before any weight is written; returns what the merge will do.

    Raises:
        StateError: As `merge` does.
        MergeError: As `merge` does.
    """
    _check_adapters(model, layers, state, adapters)
    for layer in layers.values():
        recompute(layer)
    weights, lossy = [], {}
    for delta in weight_deltas(layers, adapters):
        weights.append(weight := MergedWeight(delta.name, delta.relative_error()))
        if weight.relative_error > max_error and not delta.is_negligible():
            lossy[weight] = delta.weight.dtype
    _check_loss(weights, lossy, max_error)
    return MergeReport(adapters, tuple(weights))


def _sharing(layers: Mapping[str, nn.Module]) -> dict[object, list[tuple[nn.Module, str]]]:
    """Returns the layers that have each weight, with its attribute name there."""
    found: dict[object, list[tuple[nn.Module, str]]] = {}
    for layer in layers.values():
        for tensor in layer_state(layer).weight_names:
            found.setdefault(place_of(layer, tensor), []).append((layer, tensor))
    return found


def _check_adapters(
    model: nn.Module, layers: Mapping[str, nn.Module], state: ModelState, adapters: tuple[str, ...]
) -> None:
    check_names(state, adapters)
    for name in adapters:
        if name in state.merged:
            raise StateError(f"The adapter {name!r} is merged already.")
        if name not in state.active:
            raise StateError(f"The adapter {name!r} is not active. Call set_adapter({name!r}) first.")
    variants = [name for name in state.active if state.adapters[name].plan.config.variant != PLAIN]
    if variants and set(state.active) not in (set(adapters), set(state.merged)):
        raise StateError(
            f"The update of a variant ({listing(variants)}) depends on the untouched weight, so all active adapters "
            f"have to be merged at once: {listing(state.active)}."
        )
    if state.leaving:  # layers that have left may share a weight with those that have not
        return
    for name in (*state.merged, *adapters):
        check_complete(model, state, name)
        check_shared(model, _weights_of(layers, name))


def _weights_of(layers: Mapping[str, nn.Module], adapter: str) -> dict[str, set[str]]:
    """Returns the weights that an adapter updates, by layer name."""
    return {
        name: {slot.tensor for slot in own[adapter].slots}
        for name, layer in layers.items()
        if adapter in (own := layer_state(layer).adapters)
    }


def _check_loss(weights: list[MergedWeight], lossy: Mapping[MergedWeight, torch.dtype], max_error: float) -> None:
    unknown = [weight.name for weight in weights if not math.isfinite(weight.relative_error)]
    if unknown:
        raise MergeError(
            f"{listing(unknown)}: the weight or its update has values that are not finite, or together too large for "
            "the type, as after a training that diverged, for which a smaller learning rate helps. Nothing was merged."
        )
    if lossy:
        worst = max(lossy, key=lambda weight: weight.relative_error)
        narrow = lossy[worst].itemsize < torch.float32.itemsize
        widen = "Convert the model to a wider type first (model.float()), or allow" if narrow else "Allow"
        raise MergeError(
            f"Merging would lose {worst.relative_error:.0%} of the update of {worst.name!r} ({lossy[worst]}) to "
            f"rounding, and more than {max_error:.0%} in {len(lossy)} of {len(weights)} weights. {widen} it with "
            "max_error."
        )
