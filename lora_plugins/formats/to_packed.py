"""Converts a portable adapter to one of ours for a given model, or refuses it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from torch import Tensor, nn

from lora_plugins.adapter import changed_bases, initialize
from lora_plugins.config import LoraConfig
from lora_plugins.errors import AdapterFileError, LoraError, TargetError, listing
from lora_plugins.files import checksum, described, fingerprints, manifest_of, recipe_prefix, tensor_key, value_key
from lora_plugins.formats.changes import changed_values
from lora_plugins.formats.places import placed_layers, places_by_name
from lora_plugins.formats.portable import PortableAdapter, PortableLayer, commonest
from lora_plugins.inplace import detached_weight, model_modules, own_parameters, submodule
from lora_plugins.plan import Plan, exact_expression, exact_pattern, make_plan
from lora_plugins.plugins import PLAIN, PackedAdapter, PlannedLayer, Registry, registry_of
from lora_plugins.utils import path_runs, within

Value = TypeVar("Value")


def packed_for(model: nn.Module, adapter: PortableAdapter, registry: Registry | None) -> PackedAdapter:
    """Returns a portable adapter as one of ours, for one model with the base's own values in place; touches nothing.

    The plugins are by default all that are installed.

    Raises:
        AdapterFileError: If a layer or value has no place in the model or another shape, or if the adapter says what
            cannot be expressed here, naming it.
    """
    if not adapter.layers:
        alone = listing([*adapter.values, *adapter.changes])
        only = f" with an A and a B, and only tensors in full: {alone}. Merge it with what made it" if alone else ""
        raise AdapterFileError(f"The adapter has no layers{only or ', so there is nothing to load'}.")
    adapter = replace(adapter, layers=placed_layers(model, adapter.layers))
    places = places_by_name(model)
    saved = [places[name].name if name in places else name for name in adapter.saved_modules]
    adapter = replace(adapter, values=changed_values(model, adapter), saved_modules=saved)
    plan = _plan(model, adapter, registry)
    _check_layers(model, plan, adapter)
    tensors = {value_key(name): value for name, value in adapter.values.items()}
    for layer, slot, _ in plan.slots():
        found = adapter.layers[layer.name]
        tensors[tensor_key(layer, slot, "A")] = found.A.flatten(1)
        tensors[tensor_key(layer, slot, "B")] = found.B.flatten(1)
        if found.magnitude is not None:
            tensors[tensor_key(layer, slot, "magnitude")] = found.magnitude.flatten()
    recipes, changed = _started_anew(model, plan)
    tensors |= recipes
    registry = registry or registry_of(plan.config)
    manifest = manifest_of(
        plan, registry, adapter.name, tensors, fingerprints(model, plan), changed, described(model, registry)
    )
    return PackedAdapter(manifest, tensors)


def _plan(model: nn.Module, adapter: PortableAdapter, registry: Registry | None) -> Plan:
    """Plans what the adapter has, and nothing else."""
    try:
        try:
            plan = _plan_of_words(model, adapter, registry)
        except TargetError as error:
            if not adapter.dropout or "dropout" not in str(error):
                raise
            warnings.warn(f"The adapter is loaded without its dropout of {adapter.dropout}. {error}", stacklevel=2)
            plan = _plan_of_words(model, replace(adapter, dropout=0.0), registry)
    except (LoraError, TypeError) as error:
        raise AdapterFileError(f"The adapter does not fit this model: {error}") from error
    trained = set(plan.saved_in_place)
    lacking, surplus = sorted(trained - adapter.values.keys()), sorted(adapter.values.keys() - trained)
    if lacking or surplus:
        raise AdapterFileError(
            f"Of what was trained in full, the adapter lacks {listing(lacking) or 'nothing'}, and has "
            f"{listing(surplus) or 'nothing'} that cannot be trained by itself in this model."
        )
    return plan


def _plan_of_words(model: nn.Module, adapter: PortableAdapter, registry: Registry | None) -> Plan:
    """Plans by the adapter's own patterns or, where these match other tensors here, by naming each tensor."""
    plan = make_plan(model, _config(adapter, adapter.bias, adapter.saved_modules), registry)
    if set(plan.saved_in_place) == adapter.values.keys():
        return plan
    saved = set(adapter.saved_modules)
    parameters = own_parameters(model_modules(model))
    # In full, because the name of one is the end of another's: `norm.weight` of `blocks.0.norm.weight`.
    single = [f"^{name}" for name in adapter.values if name in parameters and not within(name, saved)]
    return make_plan(model, _config(adapter, "none", [*adapter.saved_modules, *single]), registry)


def _config(adapter: PortableAdapter, bias: Literal["none", "all", "lora_only"], saved: Sequence[str]) -> LoraConfig:
    """Returns a config that names every layer in full."""
    ranks = {name: layer.r for name, layer in adapter.layers.items()}
    alphas = {name: layer.alpha for name, layer in adapter.layers.items()}
    r, alpha = commonest(ranks.values()), commonest(alphas.values())
    return LoraConfig(
        r=r,
        alpha=alpha,
        dropout=adapter.dropout,
        target_modules="|".join(map(exact_expression, sorted(ranks))),
        bias=bias,
        modules_to_save=list(saved),
        rank_pattern=_patterns(ranks, r),
        alpha_pattern=_patterns(alphas, alpha),
        init=adapter.init,
        variant="dora" if any(layer.magnitude is not None for layer in adapter.layers.values()) else PLAIN,
        use_rslora=adapter.use_rslora,
    )


def _patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Returns the values of layers that differ, and of those whose name has the name of such a layer in it."""
    differing = {name for name, value in values.items() if value != default}
    return {exact_pattern(name): value for name, value in values.items() if not differing.isdisjoint(path_runs(name))}


def _check_layers(model: nn.Module, plan: Plan, adapter: PortableAdapter) -> None:
    """Checks that every layer has one place for its A and B, of their shapes."""
    planned = {layer.name: layer for layer in plan.layers}
    tied = [name for name in adapter.layers if name not in planned]
    if tied:
        raise AdapterFileError(
            f"{listing(tied)} shares its weight with another layer of the adapter. Here such layers have one update, "
            "and the adapter has two."
        )
    wrong = [text for name, layer in adapter.layers.items() if (text := _misfit(model, planned[name], layer))]
    if wrong:
        raise AdapterFileError("The adapter does not fit this model:\n  " + "\n  ".join(wrong))


def _misfit(model: nn.Module, planned: PlannedLayer, layer: PortableLayer) -> str:
    """Returns why A and B do not fit a layer; empty if they do."""
    module, name = submodule(model, planned.name), planned.name
    if len(planned.slots) > 1:
        return f"{name!r} has {len(planned.slots)} weights of its own, and the adapter has one A and B for it"
    if getattr(module, "groups", 1) > 1:
        return (
            f"{name!r} is a convolution of {module.groups} groups, where A and B of others are no update of its weight"
        )
    rows, columns = planned.shapes[0]
    weight = detached_weight(module, planned.slots[0].tensor)
    # Where one release of a model has a convolution of one pixel, another has a linear layer.
    A = layer.A.flatten(1) if weight.dim() == 2 and {*layer.A.shape[2:]} == {1} else layer.A
    kernel = tuple(weight.shape[2:]) if A.dim() > 2 else ()
    expected = [(layer.r, columns // math.prod(kernel), *kernel), (rows, layer.r)]
    found = [tuple(A.shape), tuple(layer.B.flatten(1).shape)]
    if found != expected:
        return f"{name!r} has A {found[0]} and B {found[1]}, and this model needs {expected[0]} and {expected[1]}"
    lacks_magnitude = planned.variant is not None and layer.magnitude is None
    if lacks_magnitude or (layer.magnitude is not None and layer.magnitude.numel() != rows):
        size = "none" if layer.magnitude is None else layer.magnitude.numel()
        return f"{name!r} needs a DoRA magnitude of {rows} values, and the adapter has {size}"
    return ""


def _started_anew(model: nn.Module, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the recipes of an init that changes the base, computed from the model, and checksums of its new base."""
    if not plan.init.changes_base:
        return {}, {}
    content = initialize(model, plan)
    recipes = {
        recipe_prefix(layer, slot) + key: tensor
        for layer, slot, _ in plan.slots()
        for key, tensor in content[layer.name, slot.suffix].recipe.items()
    }
    changed = changed_bases(model, plan, content)
    return recipes, {name: checksum(tensor) for name, tensor in changed.items()}
