"""Converts one of our adapters to the terms that foreign formats share, and refuses by name what has no such terms."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.config import LoraConfig, rank_divisor
from lora_plugins.errors import AdapterFileError, counted, listing
from lora_plugins.files import planned_again, recipe_prefix, recipes, tensor_key, value_key
from lora_plugins.formats.places import places_by_name, tensor_names
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.second_path import warn_of_second_paths
from lora_plugins.inplace import detached_weight, model_modules, submodule
from lora_plugins.plan import Plan, matches
from lora_plugins.plugins import PackedAdapter, PlannedLayer, Registry, Slot, registry_of
from lora_plugins.utils import path_starts

LAYER_TYPES = frozenset(
    {
        "linear",
        "transformers_conv1d",
        "conv1d",
        "conv2d",
        "timm_conv2d_same",
        "conv3d",
        "embedding",
        "multihead_attention",
    }
)
"""The layer types that other libraries have too."""

_WEIGHTS = frozenset({"weight", "in_proj_weight"})
"""What the one A and B of such a layer can mean."""


@dataclass(frozen=True)
class _Source:
    """What is read: an adapter, its plan, the model that both are of, and what the init left of every slot."""

    packed: PackedAdapter
    plan: Plan
    model: nn.Module
    recipes: Mapping[str, Mapping[str, Tensor]]

    def tensor(self, layer: PlannedLayer, slot: Slot, factor: str) -> Tensor:
        return self.packed.tensors[tensor_key(layer, slot, factor)]

    def recipe(self, layer: PlannedLayer, slot: Slot) -> Mapping[str, Tensor]:
        return self.recipes.get(recipe_prefix(layer, slot), {})


def portable_of(packed: PackedAdapter, model: nn.Module, registry: Registry | None) -> PortableAdapter:
    """Returns one of our adapters as a portable one, of a model with the base's own values in place.

    An adapter whose init changed the base (`pissa`, `olora`, `lora_ga`) is one of the untouched base here: of rank 2r,
    with the first A and B subtracted. Parts of a fused weight become one block-diagonal A and B. The plugins are
    by default those that the adapter's config lets load.

    Raises:
        AdapterFileError: If other libraries cannot express it, naming each layer.
    """
    manifest = packed.manifest
    config = LoraConfig.from_dict(manifest["config"])
    plan = planned_again(model, manifest, config, registry or registry_of(config))
    # The model may have got layers since, which the config would mean as well.
    plan = replace(plan, layers=tuple(layer for layer in plan.layers if layer.name in manifest["layers"]))
    source = _Source(packed, plan, model, recipes(packed.tensors))
    check_expressible(
        [f"{layer.name!r}: {what} has no form there" for layer in plan.layers for what in _without_form(source, layer)]
    )
    _warn_of_stored(manifest.get("stored") or {})
    places = places_by_name(model)
    adapted = {layer.name: places[layer.name] for layer in plan.layers}
    warn_of_second_paths(model, adapted, "With this file it computes what the model does here once it has merged.")
    keys = {name: value_key(name) for name in plan.saved_in_place}
    values = {name: packed.tensors[key] for name, key in keys.items() if key in packed.tensors}
    return PortableAdapter(
        layers={layer.name: _layer(source, layer) for layer in plan.layers},
        values=values,
        name=manifest["adapter_name"],
        use_rslora=config.use_rslora,
        dropout=config.dropout,
        bias=config.bias,
        saved_modules=_saved_modules(model, config.modules_to_save, values),
    )


def _warn_of_stored(stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Warns that no other format records how the base was stored that the adapter was trained on."""
    if stored:
        kinds = listing(dict.fromkeys(str(entry.get("storage")) for entry in stored.values()))
        warnings.warn(
            f"The adapter was trained on {counted(len(stored), 'weight')} stored as {kinds}, which this format cannot "
            "record. On float weights it adds the same update to values that differ by what storing rounded; our own "
            "format stores them again.",
            stacklevel=4,
        )


def _saved_modules(model: nn.Module, patterns: Sequence[str], values: Collection[str]) -> list[str]:
    """Returns the full names of the modules that are trained in full, without those inside another one."""
    trained = {name for name, first in tensor_names(model).items() if first in values}
    around = {start for name in trained for start in path_starts(name)[1:]}
    entries = model_modules(model)
    meant = matches("modules_to_save", patterns, [name for entry in entries for name in entry.names])
    found = {name for names in meant.values() for name in names}
    names = {entry.name for entry in entries if entry.name in around and not found.isdisjoint(entry.names)}
    return sorted(name for name in names if names.isdisjoint(path_starts(name)[1:]))


def check_expressible(refusals: Sequence[str]) -> None:
    """Refuses an adapter for the reasons given, if there are any.

    Raises:
        AdapterFileError: With all of them.
    """
    if refusals:
        raise AdapterFileError("The adapter cannot be written in this format:\n  " + "\n  ".join(refusals))


def _without_form(source: _Source, layer: PlannedLayer) -> Iterator[str]:
    """Yields what of a layer has no form in other libraries."""
    if layer.plugin.name not in LAYER_TYPES:
        yield f"a layer of type {layer.plugin.name!r}"
    if (groups := getattr(submodule(source.model, layer.name), "groups", 1)) > 1:
        yield f"a convolution of {groups} groups"
    if others := sorted({slot.tensor for slot in layer.slots} - _WEIGHTS):
        yield f"an adapter of {listing(others)}"
    variant, rows = layer.variant, sum(shape[0] for shape in layer.shapes)
    if variant is not None and variant.name != "dora":
        yield f"the variant {variant.name!r}"
    if variant is not None and any(slot.rows is not None and rows != slot.rows[2] for slot in layer.slots):
        yield "DoRA of some rows of a weight only"
    init = source.plan.init
    if init.changes_base and any(source.recipe(layer, slot).keys() != {"A", "B"} for slot in layer.slots):
        yield f"the init {init.name!r}, whose base is no low-rank change"
    if init.changes_base and source.packed.manifest.get("stored"):
        yield f"the init {init.name!r} on a base that is stored in fewer bytes"
    if layer.aliases:
        yield "a layer that stands in the model more than once"
    if layer.ties:
        yield "a weight that several adapted layers share"


def _layer(source: _Source, layer: PlannedLayer) -> PortableLayer:
    pairs = [_factors(source, layer, slot) for slot in layer.slots]
    A = torch.cat([A for A, _ in pairs])
    B = torch.cat([slot.place(B) for slot, (_, B) in zip(layer.slots, pairs, strict=True)], dim=1)
    magnitudes = [source.tensor(layer, slot, "magnitude") for slot in layer.slots if layer.variant is not None]
    weight = detached_weight(submodule(source.model, layer.name), layer.slots[0].tensor)
    if weight.dim() > 2:  # a convolution
        A, B = A.reshape(len(A), *weight.shape[1:]), B.reshape(*B.shape, *(1 for _ in weight.shape[2:]))
    grown = rank_divisor(len(A) / layer.r, use_rslora=source.plan.config.use_rslora)
    path, _, own_name = layer.name.rpartition(".")
    return PortableLayer(
        A=A,
        B=B,
        alpha=layer.alpha * grown,  # the same scaling at the new rank
        magnitude=torch.cat(magnitudes) if magnitudes else None,
        layer_type=layer.plugin.name,
        in_attention=own_name == "out_proj" and isinstance(submodule(source.model, path), nn.MultiheadAttention),
    )


def _factors(source: _Source, layer: PlannedLayer, slot: Slot) -> tuple[Tensor, Tensor]:
    """Returns A and B of a slot, against the untouched base."""
    A, B = source.tensor(layer, slot, "A"), source.tensor(layer, slot, "B")
    recipe = source.recipe(layer, slot)
    if not recipe:
        return A, B
    first_A, first_B = recipe["A"].to(A), recipe["B"].to(B)
    return torch.cat([A, first_A]), torch.cat([B, -first_B], dim=1)
