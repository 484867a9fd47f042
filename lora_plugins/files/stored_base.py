"""How a manifest describes base weights that are stored in fewer bytes, compared with those of a model.

An adapter was trained on the stored values. Its manifest holds, for each of them, how it is stored and a checksum of
what is stored; the float weights, which every user of the adapter has, are stored again when it is loaded.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_plugins.adapter import AdapterContent, check_not_owned, new_stored_weights, to_store
from lora_plugins.errors import AdapterFileError, LoraError, listing
from lora_plugins.files.fingerprint import checksum
from lora_plugins.files.origins import TO_HAVE_IT, origin, whose
from lora_plugins.inplace import StoredWeight, found_tensor, holder_of, of_all_modules, state_of, stored_weights
from lora_plugins.plan import Plan
from lora_plugins.plugins import STORAGES, Registry, Storage, storage_options


def described(model: nn.Module, registry: Registry) -> dict[str, dict[str, Any]]:
    """Returns by full name how a manifest describes the stored weights of a model."""
    return {name: _description(stored, registry) for name, stored in of_all_modules(model, stored_weights).items()}


def with_stored(plan: Plan, model: nn.Module, entries: Mapping[str, Mapping[str, Any]], registry: Registry) -> Plan:
    """Returns the plan of an adapter that stores what its manifest says, and nothing else.

    Raises:
        AdapterFileError: If it needs a storage that is not here, or the model's weights are stored otherwise.
    """
    wanted = {name: _storage(entry, registry) for name, entry in entries.items()}
    asked = plan.config.quantize
    if asked is not None and asked not in {storage.plugin.name for storage in wanted.values()}:
        raise AdapterFileError(
            f"The adapter's config says quantize={asked!r}, and its manifest has no weight that is stored so: one of "
            "them was changed. Copy the adapter again."
        )
    present = of_all_modules(model, stored_weights)
    surplus = [name for name in present if name not in wanted]
    if surplus:
        raise AdapterFileError(
            f"The adapter was trained on float values of {listing(surplus)}, which are stored as "
            f"{present[surplus[0]].storage} here. Load it onto the float model."
        )
    for name, storage in wanted.items():
        if name in present and not present[name].storage.is_same(storage):
            raise AdapterFileError(
                f"The adapter was trained on {name!r} stored as {storage}; here it is stored as "
                f"{present[name].storage}. Load it onto the float model."
            )
        if name not in present:
            _check_float(model, name, storage)
    return replace(plan, stored=wanted)


def new_checked(
    model: nn.Module, plan: Plan, content: AdapterContent, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, StoredWeight]:
    """Stores the weights of a plan outside of the model, bit for bit as they were when the adapter was trained.

    Raises:
        AdapterFileError: If one differs in a bit, or cannot be stored.
    """
    try:
        check_not_owned(model, to_store(model, plan))
        new = new_stored_weights(model, plan, content, {name: _dtype(entry) for name, entry in entries.items()})
    except LoraError as error:
        raise AdapterFileError(f"The base cannot be stored as it was: {error}") from error
    stored = {**of_all_modules(model, stored_weights), **new}
    wrong = [name for name, entry in entries.items() if _sum(stored[name]) != entry.get("sum")]
    if wrong:
        raise AdapterFileError(
            f"The adapter was trained on another base: {listing(wrong)}, stored as {stored[wrong[0]].storage}, differ "
            f"in their bits from those it was made for ({len(wrong)} of {len(entries)} stored weights). Load the base "
            "model's own pretrained weights in their original type first, unmerged."
        )
    return new


def _description(stored: StoredWeight, registry: Registry) -> dict[str, Any]:
    name = stored.storage.plugin.name
    return {
        "storage": name,
        **origin(registry, STORAGES, name),
        "options": dict(stored.storage.options),
        "dtype": str(stored.source_dtype).removeprefix("torch."),
        "sum": _sum(stored),
    }


def _sum(stored: StoredWeight) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.tensors.items()):
        digest.update(f"{name}:{list(tensor.shape)}:{checksum(tensor)};".encode())
    return digest.hexdigest()


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(entry.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise AdapterFileError("The manifest has no proper entry 'stored'; it is damaged. Copy the adapter again.")
    return dtype


def _storage(entry: Mapping[str, Any], registry: Registry) -> Storage:
    name = str(entry.get("storage"))
    if name not in registry.of(STORAGES):
        raise AdapterFileError(
            f"The adapter was trained on weights stored as {name!r} of {whose(entry)}, which is not here. "
            f"{TO_HAVE_IT}{registry.absent()}"
        ) from registry.cause()
    plugin = registry.get(STORAGES, name)
    try:
        return Storage(plugin, storage_options(plugin, entry.get("options") or {}))
    except LoraError as error:
        raise AdapterFileError(f"The adapter's weights cannot be stored: {error}") from error


def _check_float(model: nn.Module, name: str, storage: Storage) -> None:
    parameter = found_tensor(model, name)
    if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point() or parameter.is_meta:
        raise AdapterFileError(
            f"The adapter was trained on {name!r} stored as {storage}; this model has no such float parameter."
        )
    if state_of(holder_of(model, name)[0]) is not None:
        raise AdapterFileError(
            f"The adapter was trained on {name!r} stored as {storage}; here another adapter acts on its float value. "
            "Load the quantized adapter first, or onto a model of its own."
        )
