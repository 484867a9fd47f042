"""An adapter as plain data, made from a model."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from lora_plugins.adapter import ModelState, base_in_place, check_in_place, check_norms
from lora_plugins.files.fingerprint import checksum, fingerprints
from lora_plugins.files.manifest import FORMAT, checked_manifest, recipe_prefix, tensor_entry, tensor_key, value_key
from lora_plugins.files.origins import origin
from lora_plugins.files.stored_base import described
from lora_plugins.inplace import slot_tensors, submodule
from lora_plugins.names import DISTRIBUTION
from lora_plugins.plan import Plan
from lora_plugins.plugins import INITS, LAYERS, VARIANTS, PackedAdapter, PlannedLayer, Registry, registry_of


def pack(
    model: nn.Module, state: ModelState, adapter_name: str, registry: Registry | None, *, of_first_base: bool
) -> PackedAdapter:
    """Returns an adapter of a model as plain data. The tensors are the model's own, not copies.

    The plugins are by default those that its config lets load. With `of_first_base`, it is to load onto the base as it
    was before weights of it were moved by hand: those that `Adapter.kept` names.

    Raises:
        StateError: If a layer of it was replaced, or has another name.
    """
    check_in_place(model, state, adapter_name, read_only=not of_first_base)  # else a resume writes into them
    check_norms(model, state, adapter_name)
    adapter = state.adapters[adapter_name]
    plan = adapter.plan
    registry = registry or registry_of(plan.config)
    tensors: dict[str, Tensor] = {}
    for layer, slot, _ in plan.slots():
        for name, parameter in slot_tensors(submodule(model, layer.name), adapter_name, slot).items():
            tensors[tensor_key(layer, slot, name)] = parameter.detach()
        for name, tensor in adapter.recipes[layer.name, slot.suffix].items():
            tensors[recipe_prefix(layer, slot) + name] = tensor
    for name in plan.saved_in_place:
        tensors[value_key(name)] = state.values.value(model, adapter_name, name)
    with base_in_place(model, state):
        base = fingerprints(model, plan, adapter.fingerprints)
    if of_first_base:
        base |= adapter.kept
    changed = _changed(model, state, adapter_name)
    stored = described(model, registry)
    manifest = manifest_of(plan, registry, adapter_name, tensors, base, changed, stored)
    return PackedAdapter(manifest, tensors)


def manifest_of(
    plan: Plan,
    registry: Registry,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    base: Mapping[str, dict[str, float]],
    changed: Mapping[str, str],
    stored: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the manifest of an adapter.

    The tensors have the keys of `files.manifest`; `base` and `changed` are the fingerprints of adapted weights and the
    checksums of those that the init changed, and `stored` is what `files.stored_base` says of stored ones.
    """
    return {
        "format": FORMAT,
        "lora_plugins": metadata.version(DISTRIBUTION),
        "adapter_name": adapter_name,
        "config": plan.config.to_dict(),
        "init": {"name": plan.init.name, **origin(registry, INITS, plan.init.name)},
        "variant": {"name": plan.config.variant, **origin(registry, VARIANTS, plan.config.variant)},
        "layer_types": list(plan.layer_types),
        "layers": {layer.name: _describe(layer, registry) for layer in plan.layers},
        **({"ranks": dict(plan.ranks)} if plan.ranks else {}),
        "tensors": {key: tensor_entry(tensor) for key, tensor in tensors.items()},
        "base": base,
        "changed": changed,
        **({"stored": stored} if stored else {}),
    }


def saved_name(packed: PackedAdapter) -> str:
    """Returns the name that an adapter was saved under.

    Raises:
        AdapterFileError: If the manifest is damaged or newer.
    """
    return str(checked_manifest(packed.manifest)["adapter_name"])


def _describe(layer: PlannedLayer, registry: Registry) -> dict[str, Any]:
    return {
        "plugin": layer.plugin.name,
        **origin(registry, LAYERS, layer.plugin.name),
        "r": layer.r,
        "alpha": layer.alpha,
        "scaling": layer.scaling,
        "slots": [[slot.tensor, slot.part] for slot in layer.slots],
    }


def _changed(model: nn.Module, state: ModelState, adapter_name: str) -> dict[str, str]:
    plan = state.adapters[adapter_name].plan
    own = set(plan.saved_in_place)
    names = [name for name in state.values.of(adapter_name) if name not in own]
    return {name: checksum(state.values.value(model, adapter_name, name)) for name in names}
