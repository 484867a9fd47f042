"""Combines adapters into a new one; `combinations` says how their updates are combined.

Trained heads and biases are combined by the weighted sum of their differences from the base.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_plugins.adapter.combinations import Update, check_options, combined_update
from lora_plugins.adapter.content import NewAdapter, SlotTensors, factor_dtype
from lora_plugins.adapter.integrity import check_in_place
from lora_plugins.adapter.state import ModelState
from lora_plugins.arguments import weighted
from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, StateError, listing
from lora_plugins.inplace import detached_weight, factors, full_name, layer_state, own_tensor, submodule
from lora_plugins.plan import Plan, exact_expression, exact_pattern, make_plan
from lora_plugins.plugins import PLAIN, PlannedLayer, Registry, Slot
from lora_plugins.utils import in_float64

_VARIANCE = "running_var"
"""What normalization layers of torch call their running variance."""


def combine(
    model: nn.Module,
    state: ModelState,
    registry: Registry | None,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    options: Mapping[str, float],
) -> tuple[NewAdapter, float]:
    """Computes a new adapter from others; touches nothing. Arguments as in `LoraModel.add_weighted_adapter`.

    Returns:
        The adapter, and the largest relative error of a layer's update against the exact combination.
    """
    if not adapters:
        raise ConfigError("There are no adapters to combine: name one or more.")
    check_options(combination_type, options)
    terms = weighted(adapters, weights)
    plans = [state.adapter(name).plan for name in adapters]
    for name, plan in zip(adapters, plans, strict=True):
        _check_source(name, plan)
        check_in_place(model, state, name)
    layers = _layers_of(plans)
    results: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    generator, error = torch.Generator().manual_seed(torch.initial_seed()), 0.0
    for layer in layers.values():
        module = submodule(model, layer.name)
        for slot in layer.slots:
            A, B, relative = combined_update(_updates(module, slot, terms), combination_type, options, generator)
            largest = A.abs().amax() * B.abs().amax() * len(A)  # of B @ A, which is not formed here
            _check_range(layer.name, factor_dtype(detached_weight(module, slot.tensor)), A, B, largest)
            results[layer.name, slot.suffix] = (A, B)
            error = max(error, relative)
    plan = make_plan(model, _config(model, plans, layers, results), registry)
    return NewAdapter(plan, _padded(results, plan), _values(model, state, terms)), error


def _check_source(name: str, plan: Plan) -> None:
    """Checks that the updates of an adapter can be added up."""
    if plan.init.changes_base:
        raise StateError(f"The adapter {name!r} has a base of its own ({plan.config.init}); it cannot be combined.")
    if plan.config.variant != PLAIN:
        raise StateError(
            f"The adapter {name!r} is of the variant {plan.config.variant!r}, whose updates do not add up; it cannot "
            "be combined."
        )


def _layers_of(sources: Sequence[Plan]) -> dict[str, PlannedLayer]:
    """Returns the layers that adapters adapt, by name.

    Raises:
        ConfigError: If two of them do not adapt the same of a layer, and of what shares its weight.
    """
    layers: dict[str, PlannedLayer] = {}
    trained = {name for source in sources for name in source.trained}
    for layer in (layer for source in sources for layer in source.layers):
        first = layers.setdefault(layer.name, layer)
        if first.slots != layer.slots:
            raise ConfigError(f"The adapters have different parts of {layer.name!r}; they cannot be combined.")
        if any(full_name(layer.name, slot.tensor) in trained for slot in layer.slots):
            raise ConfigError(
                f"One adapter adapts {layer.name!r}, and another one trains it in full; they cannot be combined. "
                "set_adapter([...]) lets both act."
            )
        if {tie.layer for tie in first.ties} != {tie.layer for tie in layer.ties}:
            others = listing(tie.layer for tie in (*first.ties, *layer.ties))
            raise ConfigError(
                f"Only one of the adapters adapts {others} with {layer.name!r}, whose weight they share; they "
                "cannot be combined."
            )
    tied = {tie.layer: layer.name for layer in layers.values() for tie in layer.ties}
    for name in tied.keys() & layers.keys():
        raise ConfigError(
            f"One adapter adapts {name!r} alone, and another one with {tied[name]!r}, whose weight it shares; they "
            "cannot be combined."
        )
    return layers


def _updates(module: nn.Module, slot: Slot, terms: Sequence[tuple[str, float]]) -> list[Update]:
    """Returns the updates of a slot in float64, of those adapters that the layer has."""
    planned, updates = layer_state(module).adapters, []
    for name, weight in terms:
        if name in planned:
            A, B = (in_float64(factor.detach()) for factor in factors(module, name, slot))
            updates.append(Update(A, B * planned[name].scaling, weight))
    return updates


def _check_range(name: str, dtype: torch.dtype, *tensors: Tensor) -> None:
    if not all(bool(tensor.to(dtype).isfinite().all()) for tensor in tensors):
        raise ConfigError(
            f"The combination of {name!r} has values that are not finite in {dtype}: a weight is too large, or an "
            "adapter has such values itself."
        )


def _config(
    model: nn.Module,
    sources: list[Plan],
    layers: Mapping[str, PlannedLayer],
    results: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
) -> LoraConfig:
    """Returns a config that names every layer in full, with its rank, and gives a scaling of 1."""
    ranks: dict[str, int] = {}
    for (name, _), (A, _) in results.items():
        ranks[name] = max(ranks.get(name, 0), len(A))
    configs = [source.config for source in sources]
    biases = {config.bias for config in configs}
    targets = [*layers, *(tie.layer for layer in layers.values() for tie in layer.ties)]
    return LoraConfig(
        r=max(ranks.values()),
        alpha=float(max(ranks.values())),
        target_modules="|".join(sorted(exact_expression(name) for name in targets)),
        bias=next((bias for bias in ("all", "lora_only") if bias in biases), "none"),
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save}),
        rank_pattern={exact_pattern(name): rank for name, rank in ranks.items()},
        alpha_pattern={exact_pattern(name): float(rank) for name, rank in ranks.items()},
        fused_parts={
            exact_pattern(name): [slot.part for slot in layer.slots]
            for name, layer in layers.items()
            if layer.slots != tuple(layer.plugin.slots(submodule(model, name)))
        },
        norm="track" if any(config.norm == "track" for config in configs) else "freeze",
        allow_plugins=configs[0].allow_plugins,
        block_plugins=configs[0].block_plugins,
    )


def _padded(results: Mapping[tuple[str, str], tuple[Tensor, Tensor]], plan: Plan) -> dict[tuple[str, str], SlotTensors]:
    """Gives all slots of a layer one rank, by zeros."""
    content: dict[tuple[str, str], SlotTensors] = {}
    for layer, slot, _ in plan.slots():
        A, B = results[layer.name, slot.suffix]
        extra = layer.r - A.shape[0]
        A = torch.nn.functional.pad(A, (0, 0, 0, extra))
        B = torch.nn.functional.pad(B, (0, extra))
        content[layer.name, slot.suffix] = SlotTensors(A, B)
    return content


def _values(model: nn.Module, state: ModelState, terms: Sequence[tuple[str, float]]) -> dict[str, Tensor]:
    """Combines what the adapters trained in place, as differences from the base."""
    values: dict[str, Tensor] = {}
    for name in state.values.base:
        device = own_tensor(model, name).device  # values that are not in place may still be where the model was
        owned = [
            (state.values.value(model, adapter, name).to(device), weight)
            for adapter, weight in terms
            if name in state.values.of(adapter)
        ]
        if not owned:
            continue
        base = state.values.base_value(model, name).to(device)
        if not base.dtype.is_floating_point:
            values[name] = owned[0][0].clone()
            continue
        # In float64, so that a single adapter of weight 1 gives its own value back.
        wide = total = in_float64(base)
        for value, weight in owned:
            total = total + weight * (in_float64(value) - wide)
        values[name] = total.to(owned[0][0])
        _check_range(name, values[name].dtype, values[name])
        if name.rpartition(".")[2] == _VARIANCE and bool((values[name] < 0).any()):
            raise ConfigError(
                f"The combination of {name!r} is less than 0 in places, and a variance is not: its norm would compute "
                "nan. Give weights from 0 on, of a sum of at most 1, or combine adapters with norm='freeze'."
            )
    return values
