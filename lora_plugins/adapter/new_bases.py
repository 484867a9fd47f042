"""The base weights that a new adapter puts in place of others, computed before anything of the model is touched."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lora_plugins.adapter.answers import base_of, check_stored
from lora_plugins.adapter.content import AdapterContent, factor_dtype, slot_matrix
from lora_plugins.errors import StateError, noted
from lora_plugins.inplace import (
    StoredWeight,
    detached_weight,
    full_name,
    holder_of,
    own_tensor,
    stored_weight,
    submodule,
)
from lora_plugins.plan import Plan
from lora_plugins.plugins import Storage
from lora_plugins.utils import in_full, laid_out_like


def changed_bases(model: nn.Module, plan: Plan, content: AdapterContent) -> dict[str, Tensor]:
    """Computes the base weights that the plan's init replaces, by full name; empty for most inits.

    A weight that is stored in fewer bytes is not the adapter's but the model's; see `new_stored_weights`.
    """
    names = {full_name(layer.name, slot.tensor) for layer, slot, _ in plan.slots()} - plan.stored.keys()
    return _bases(model, plan, content, names, {}, stored=False)


def to_store(model: nn.Module, plan: Plan) -> dict[str, Storage]:
    """Returns by full name how those weights of a plan are to be stored that are not stored yet."""
    return {name: storage for name, storage in plan.stored.items() if stored_weight(*holder_of(model, name)) is None}


def new_stored_weights(
    model: nn.Module,
    plan: Plan,
    content: AdapterContent,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> dict[str, StoredWeight]:
    """Stores the weights that the plan names, by full name, outside of the model; tied ones share the result.

    Weights that are stored already are left out. `dtypes` has the types that weights had when they were stored before.

    Raises:
        StateError: If a weight has values that are not finite.
        PluginError: If the storage does not restore the smallest of them.
    """
    new = to_store(model, plan)
    changed = _bases(model, plan, content, set(new), dtypes, stored=True)
    made: dict[int, StoredWeight] = {}
    for name, storage in new.items():
        parameter = own_tensor(model, name)
        if id(parameter) in made and name not in changed:
            continue
        dtype = dtypes.get(name, parameter.dtype)
        value = changed.get(name, parameter.detach().to(dtype))
        made[id(parameter)] = _stored(storage, name, value, dtype, parameter)
    if made:  # a storage that fails does so at once: to restore every weight would take as long as to store it
        least = min(new, key=lambda name: own_tensor(model, name).numel())
        with noted(f"the storage {new[least].plugin.name!r}, for {least!r}"):
            check_stored(new[least], least, made[id(own_tensor(model, least))].dense())
    return {name: made[id(own_tensor(model, name))] for name in new}


def _stored(storage: Storage, name: str, value: Tensor, dtype: torch.dtype, parameter: Tensor) -> StoredWeight:
    """Stores the value that replaces a parameter; `dtype` is the type that its weight had before it was ever stored.

    Raises:
        StateError: If some of the values are not finite.
    """
    if not bool(value.isfinite().all()):
        raise StateError(f"{name!r} has values that are not finite, which cannot be stored as {storage}.")
    with noted(f"the storage {storage.plugin.name!r}, for {name!r}"):
        return StoredWeight(
            storage,
            value,
            parameter.dtype,
            source_dtype=dtype,
            device=parameter.device,
            requires_grad=parameter.requires_grad,
        )


def _bases(
    model: nn.Module,
    plan: Plan,
    content: AdapterContent,
    names: set[str],
    dtypes: Mapping[str, torch.dtype],
    *,
    stored: bool,
) -> dict[str, Tensor]:
    """Computes what an init puts in place of those base weights that are named, by full name; empty for most inits.

    `dtypes` has the types that weights had when this was computed before. What is `stored` in fewer bytes is wanted in
    the type of the factors, not of the weight.
    """
    if not plan.init.changes_base:
        return {}
    compute = plan.init.base_to_store if stored else plan.init.changed_base
    changed: dict[str, Tensor] = {}
    for layer, slot, _ in plan.slots():
        name = full_name(layer.name, slot.tensor)
        if name not in names:
            continue
        original = detached_weight(submodule(model, layer.name), slot.tensor)
        original = original.to(dtypes.get(name, original.dtype))
        weight = changed.get(name, original.to(factor_dtype(original)) if stored else original)
        matrix = layer.plugin.to_matrix(weight).clone()
        recipe = {key: value.cpu() for key, value in content[layer.name, slot.suffix].recipe.items()}
        place = f"the init {plan.init.name!r}, computing the base of {layer.name!r}"
        with torch.no_grad(), in_full(original), noted(place):
            before = slot_matrix(layer, slot, original).to("cpu", factor_dtype(original), copy=True)
            new = compute(before, recipe, layer.scaling, plan.init_options)
        slot.cut(matrix).copy_(base_of(plan.init, layer, new, before.shape))
        changed[name] = laid_out_like(original, layer.plugin.from_matrix(matrix, original.shape))
    return changed
