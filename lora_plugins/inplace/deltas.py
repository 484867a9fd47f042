"""The updates of an adapted layer: as terms for a branch, as `ΔW`, and added to the weight."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lora_plugins.errors import PluginError, StateError, add_place, counted
from lora_plugins.inplace.container import AdapterTensors
from lora_plugins.inplace.layer_state import LayerState, layer_state
from lora_plugins.inplace.shards import is_kept_in_parts
from lora_plugins.inplace.weights import raw_weight, weight_with_merged
from lora_plugins.plugins import PlannedLayer, Rescaling, Slot, StackedAdapters, Term, add_delta, joined, sum_of_deltas
from lora_plugins.utils import in_full, shape_or_value


def factors(layer: nn.Module, adapter: str, slot: Slot) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A and B of one slot of one adapter."""
    modules = layer._modules
    A, B = modules[f"lora_A{slot.suffix}"], modules[f"lora_B{slot.suffix}"]
    return cast(AdapterTensors, A)[adapter], cast(AdapterTensors, B)[adapter]


def own_tensors_of(layer: nn.Module, adapter: str, slot: Slot) -> dict[str, nn.Parameter]:
    """Returns the tensors of one slot of one adapter that are its variant's own, by name."""
    names = layer_state(layer).adapters[adapter].own_shapes(slot)
    return {name: cast(AdapterTensors, layer._modules[f"lora_{name}{slot.suffix}"])[adapter] for name in names}


def slot_tensors(layer: nn.Module, adapter: str, slot: Slot) -> dict[str, nn.Parameter]:
    """Returns all tensors of one slot of one adapter: `A`, `B`, and the variant's own by name."""
    A, B = factors(layer, adapter, slot)
    return {"A": A, "B": B, **own_tensors_of(layer, adapter, slot)}


def rescaled_term(layer: nn.Module, adapter: str, planned: PlannedLayer, slot: Slot, *, training: bool) -> Term:
    """Returns the update of a variant that rescales the rows of the weight, for a branch that does so."""
    variant, own = planned.variant, own_tensors_of(layer, adapter, slot)
    assert variant is not None
    names = tuple(own)

    def row_factors(direction: Tensor, *tensors: Tensor) -> Tensor:
        try:
            found = variant.row_factors(direction, dict(zip(names, tensors, strict=True)))
        except Exception as error:
            add_place(error, f"row_factors() of the variant {variant.name!r}, for {planned.name!r}")
            raise
        if not isinstance(found, Tensor) or found.shape != direction.shape[:1]:
            raise PluginError(
                f"row_factors() of the variant {variant.name!r} gives {shape_or_value(found)!r} for {planned.name!r}, "
                f"where the matrix has {len(direction)} rows."
            )
        return found

    rescaling = Rescaling(tuple(own.values()), row_factors)
    return Term(slot, *factors(layer, adapter, slot), planned.settings, training, rescaling=rescaling)


def term_of(layer: nn.Module, adapter: str, planned: PlannedLayer, slot: Slot, *, training: bool) -> Term:
    """Returns the update of one slot of one adapter, ready for a branch."""
    A, B = factors(layer, adapter, slot)
    delta = None
    if planned.variant is not None:
        wide = torch.promote_types(A.dtype, torch.float32)
        weight = slot.cut(planned.plugin.to_matrix(raw_weight(layer, slot.tensor))).to(wide)
        own = {name: tensor.to(wide) for name, tensor in own_tensors_of(layer, adapter, slot).items()}
        delta = variant_delta(planned, weight, A.to(wide), B.to(wide), own)
    weight_of = layer_state(layer).weights.get(adapter, 1.0)
    if weight_of == 1:
        return Term(slot, A, B, planned.settings, training, delta)
    settings = replace(planned.settings, scaling=planned.scaling * weight_of)
    return Term(slot, A, B, settings, training, None if delta is None else delta * weight_of)


def variant_delta(planned: PlannedLayer, weight: Tensor, A: Tensor, B: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Returns by what the variant of a layer changes a weight, all in one type.

    Raises:
        PluginError: If that is no matrix of the weight's shape.
    """
    assert planned.variant is not None
    try:
        with in_full(weight):
            delta = planned.variant.delta_weight(weight, A, B, planned.scaling, own)
    except Exception as error:
        add_place(error, f"delta_weight() of the variant {planned.variant.name!r}, for {planned.name!r}")
        raise
    if not isinstance(delta, Tensor) or delta.shape != weight.shape:
        raise PluginError(
            f"delta_weight() of the variant {planned.variant.name!r} gives {shape_or_value(delta)!r} for "
            f"{planned.name!r}, where the weight is {tuple(weight.shape)}."
        )
    return delta


def terms_of(layer: nn.Module, name: str, adapter: str) -> list[Term]:
    """Returns the updates of one adapter to the weight called `name`, without dropout; none if it has none there."""
    planned = layer_state(layer).adapters[adapter]
    return [term_of(layer, adapter, planned, slot, training=False) for slot in planned.slots if slot.tensor == name]


def effective_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns `W + ΔW` over the active adapters; of a weight that is elsewhere, what is here of `W`.

    FSDP splits it over processes, and accelerate leaves one on the meta device, until the layer is called.
    """
    state = layer_state(layer)
    weight = weight_with_merged(layer, name)
    if not state.active or is_kept_in_parts(layer, name) or (weight.is_meta and _is_offloaded(layer, state)):
        return weight
    with in_full(weight):
        deltas = []
        for adapter in state.active:
            if terms := terms_of(layer, name, adapter):
                deltas.append(state.adapters[adapter].plugin.from_matrix(sum_of_deltas(terms), weight.shape))
        return add_delta(weight, sum(deltas[1:], deltas[0])) if deltas else weight


def _is_offloaded(layer: nn.Module, state: LayerState) -> bool:
    """Whether A has values, where the weight has none; on a model that is on the meta device, neither has."""
    return not all(factors(layer, adapter, slot)[0].is_meta for adapter, _, slot in state.active_slots())


def stacked_adapters(
    layer: nn.Module, state: LayerState, rows: tuple[str | None, ...], x: Tensor, *, training: bool
) -> StackedAdapters:
    """Returns the adapters of the rows of a mixed batch; `x` is what the layer is called with, the batch first.

    Raises:
        StateError: If the layer is in training mode, or its input has another number of rows.
    """
    if training:
        raise StateError(
            f"{state.name!r} is in training mode inside mixed_batch(), which is for inference. Call model.eval() first."
        )
    if len(x) != len(rows):
        raise StateError(
            f"{state.name!r} gets {counted(len(x), 'row')} for a batch of {counted(len(rows), 'adapter name')}. Give "
            "one name for each row of the batch. If there is one, the layer's first dimension is no batch: run one "
            "batch for each adapter."
        )
    tensor = state.adapters[state.active[0]].slots[0].tensor
    terms = [_mixed_term(layer, tensor, name, state.adapters[name]) for name in state.active]

    def weight() -> Tensor:
        return state.adapters[state.active[0]].plugin.to_matrix(weight_with_merged(layer, tensor))

    with in_full(x):
        return StackedAdapters.stack(terms, cast(Tensor, state.index).to(x.device), weight)


def _mixed_term(layer: nn.Module, tensor: str, adapter: str, planned: PlannedLayer) -> Term:
    """Returns the update of one adapter of a mixed batch."""
    if planned.variant is not None:
        return rescaled_term(layer, adapter, planned, planned.slots[0], training=False)
    return cast(Term, joined(terms_of(layer, tensor, adapter)))
