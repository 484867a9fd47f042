"""The tensors of a new adapter, computed before anything of the model is touched; `new_bases` has the weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter.answers import check_filled, own_values, read_only, recipe_of
from lora_plugins.adapter.same_start import check_first_update
from lora_plugins.errors import TargetError, noted
from lora_plugins.inplace import StoredWeight, detached_weight, full_name, own_tensor, stored_weight, submodule
from lora_plugins.plan import Plan
from lora_plugins.plugins import InitContext, PlannedLayer, Slot, SlotCalibration
from lora_plugins.utils import in_full, run_seed, single_at_least


@dataclass(frozen=True)
class SlotTensors:
    """The tensors of one slot of one layer.

    Args:
        A: `(r, in)`.
        B: `(out, r)`.
        recipe: What the init needs to compute the changed base again; empty for most inits.
        own: The tensors that are the variant's own, by name; empty for plain LoRA.
    """

    A: Tensor
    B: Tensor
    recipe: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)


AdapterContent = Mapping[tuple[str, str], SlotTensors]
"""The tensors of an adapter by layer name and slot suffix."""


@dataclass(frozen=True)
class NewAdapter:
    """An adapter that fits a model, and is not on it yet.

    Args:
        plan: What it adapts.
        content: Its tensors by layer name and slot suffix.
        values: Its heads, biases and statistics by full name, where they were saved.
        changed: The base weights that its init replaces, by full name; None where they are to be computed.
        stored: The base weights that are stored in fewer bytes from now on, by full name; None where they are to be
            made.
    """

    plan: Plan
    content: AdapterContent
    values: Mapping[str, Tensor] = field(default_factory=dict)
    changed: Mapping[str, Tensor] | None = None
    stored: Mapping[str, StoredWeight] | None = None


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Returns the type of A and B: that of the weight, or float32 where the weight has half precision."""
    return single_at_least(weight.dtype)


def slot_matrix(layer: PlannedLayer, slot: Slot, weight: Tensor) -> Tensor:
    """Returns the matrix view `(out, in)` of the part of a weight that a slot covers."""
    return slot.cut(layer.plugin.to_matrix(weight))


def initialize(
    model: nn.Module, plan: Plan, calibration: Mapping[tuple[str, str], SlotCalibration] | None = None
) -> dict[tuple[str, str], SlotTensors]:
    """Lets the plan's init make A and B of every slot; touches nothing of the model.

    Each slot draws from a generator of its own, seeded by the run's seed and the layer's name, so that every process
    of a run and every rerun agree, whatever was drawn before.

    Raises:
        StateError: If new modules are kept empty here.
        PluginError: If the init left A or B without values, or wrote into the weight.
        TargetError: If the init starts from a weight that is not finite.
    """
    content: dict[tuple[str, str], SlotTensors] = {}
    for layer, slot, shape in plan.slots():
        weight = detached_weight(submodule(model, layer.name), slot.tensor)
        seen = (calibration or {}).get((layer.name, slot.suffix), SlotCalibration())
        generator = torch.Generator().manual_seed(run_seed(layer.name + slot.suffix))
        stored = _rounding(model, plan, layer, slot, weight)
        context = init_context(plan, layer, slot, weight, seen, generator, stored)
        if plan.init.changes_base and not bool(context.weight.isfinite().all()):
            raise TargetError(
                f"{layer.name!r}: its weight has values that are not finite, so the init {plan.init.name!r} cannot "
                "start from it. Load the weights, or exclude the layer."
            )
        place = f"fill() of the init {plan.init.name!r}, for {layer.name!r}"
        with torch.no_grad(), in_full(weight), noted(place), read_only(weight, place):
            recipe = plan.init.fill(context)
        check_filled(plan.init, context, layer.r, shape)
        content[layer.name, slot.suffix] = SlotTensors(context.A, context.B, recipe_of(plan.init, layer, recipe))
    return content


class _Context(InitContext):
    """Takes the weight to the CPU once an init reads it, which most do not: all else is there, on every device."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "weight" and value.device.type != "cpu":
            value = value.cpu()
            object.__setattr__(self, name, value)
        return value


def init_context(
    plan: Plan,
    layer: PlannedLayer,
    slot: Slot,
    weight: Tensor,
    calibration: SlotCalibration,
    generator: torch.Generator,
    stored: Callable[[Tensor], Tensor] | None = None,
) -> InitContext:
    """Returns what an init is handed for a slot of a weight, with A and B full of NaN."""
    dtype = factor_dtype(weight)
    matrix = slot_matrix(layer, slot, weight).to(dtype=dtype)
    rows, columns = matrix.shape
    return _Context(
        layer=layer.name,
        weight=matrix,
        A=torch.full((layer.r, columns), math.nan, dtype=dtype, device="cpu"),
        B=torch.full((rows, layer.r), math.nan, dtype=dtype, device="cpu"),
        scaling=layer.scaling,
        lookup=layer.plugin.lookup,
        generator=generator,
        options=plan.init_options,
        calibration=calibration,
        stored=stored,
    )


def _rounding(
    model: nn.Module, plan: Plan, layer: PlannedLayer, slot: Slot, weight: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that rounds the values of one slot as storing does, on the CPU; None for other weights."""
    storage = plan.stored.get(full_name(layer.name, slot.tensor))
    if storage is None or stored_weight(submodule(model, layer.name), slot.tensor) is not None:
        return None
    original = layer.plugin.to_matrix(weight)

    def rounded(values: Tensor) -> Tensor:
        matrix = original.to("cpu", factor_dtype(weight), copy=True)
        slot.cut(matrix).copy_(values)
        dense = storage.rounded(layer.plugin.from_matrix(matrix, weight.shape))
        return slot_matrix(layer, slot, dense.to(weight.dtype)).to(values.dtype)

    return rounded


def with_own_tensors(
    model: nn.Module,
    plan: Plan,
    content: AdapterContent,
    changed: Mapping[str, Tensor],
    stored: Mapping[str, StoredWeight],
) -> AdapterContent:
    """Returns the content of a new adapter with the first values of its variant's own tensors.

    The base weights that take the place of others are in `changed` and `stored`, by full name.

    Raises:
        PluginError: If the variant does not give the tensors that it says, or wrote into the weight.
        TargetError: If the init has taken another matrix out of the base than the variant first adds.
    """
    completed = dict(content)
    for layer, slot, _ in plan.slots():
        if layer.variant is None:
            continue
        tensors = content[layer.name, slot.suffix]
        name = full_name(layer.name, slot.tensor)
        if name in stored:
            weight = stored[name].dense()
        else:
            weight = changed.get(name, detached_weight(submodule(model, layer.name), slot.tensor))
        A, B = tensors.A.to(weight.device), tensors.B.to(weight.device)
        place = f"first_values() of the variant {layer.variant.name!r}, for {layer.name!r}"
        with in_full(weight), read_only(weight, place):
            matrix = slot_matrix(layer, slot, weight).to(A.dtype)
            with noted(place):
                returned = layer.variant.first_values(matrix, A, B, layer.scaling)
            own = own_values(layer, slot, returned)
            if plan.init.changes_base:
                check_first_update(plan.init, layer, matrix, A, B, own)
        completed[layer.name, slot.suffix] = replace(tensors, own=own)
    return completed


def trained_values(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Copies what the adapter will train or move in place: its first values.

    They keep the type that the model has them in, so that the model computes with them as it did without.
    """
    return {name: own_tensor(model, name).detach().clone() for name in plan.saved_in_place}
