"""Checks an adapter of a file against a model, before anything is touched."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_plugins.adapter import NewAdapter, SlotTensors, changed_bases
from lora_plugins.config import LoraConfig
from lora_plugins.errors import AdapterFileError, LoraError, counted, listing, sentence
from lora_plugins.files.fingerprint import fingerprints, has_checksum, same
from lora_plugins.files.foreign_patterns import check_patterns
from lora_plugins.files.manifest import checked_manifest, recipe_prefix, recipes, tensor_entry, tensor_key, value_key
from lora_plugins.files.origins import check_origins, versions_told
from lora_plugins.files.other_root import check_root
from lora_plugins.files.stored_base import new_checked, with_stored
from lora_plugins.inplace import model_modules, own_tensor
from lora_plugins.plan import Plan, make_plan
from lora_plugins.plugins import PackedAdapter, Registry, registry_of


def unpack(model: nn.Module, packed: PackedAdapter, registry: Registry | None) -> NewAdapter:
    """Checks an adapter against a model, and returns it as one that fits; touches nothing.

    The model has the base's own values in place. The plugins are by default those that the adapter's config lets load.

    Raises:
        AdapterFileError: If the manifest is damaged or newer, tensors are missing, surplus or of another shape, or the
            model is not the one the adapter was made for.
    """
    manifest = checked_manifest(packed.manifest)
    _compare_tensors(manifest["tensors"], packed.tensors)
    with _misfit_told():
        config = LoraConfig.from_dict(manifest["config"])
        registry = registry or registry_of(config)
        check_origins(manifest, config, registry)
    with versions_told(manifest, registry):
        return _unpacked(model, packed, config, registry)


def _unpacked(model: nn.Module, packed: PackedAdapter, config: LoraConfig, registry: Registry) -> NewAdapter:
    manifest = packed.manifest
    with _misfit_told():
        names = [name for entry in model_modules(model) for name in entry.names]
        check_root(manifest["layers"], set(names))
        check_patterns(config, names)
        plan = planned_again(model, manifest, config, registry)
        plan = with_stored(plan, model, manifest.get("stored") or {}, registry)
    _compare_layers(manifest["layers"], plan)
    found = recipes(packed.tensors) if plan.init.changes_base else {}
    _compare_keys(model, plan, packed.tensors, found)
    _compare_base(manifest["base"], fingerprints(model, plan))
    content = {
        (layer.name, slot.suffix): SlotTensors(
            A=packed.tensors[tensor_key(layer, slot, "A")],
            B=packed.tensors[tensor_key(layer, slot, "B")],
            recipe=found.get(recipe_prefix(layer, slot), {}),
            own={name: packed.tensors[tensor_key(layer, slot, name)] for name in layer.own_shapes(slot)},
        )
        for layer, slot, _ in plan.slots()
    }
    values = {name: packed.tensors[value_key(name)] for name in plan.saved_in_place}
    stored = new_checked(model, plan, content, manifest.get("stored") or {})
    return NewAdapter(plan, content, values, stored=stored)


def planned_again(model: nn.Module, manifest: Mapping[str, Any], config: LoraConfig, registry: Registry) -> Plan:
    """Plans a saved adapter, with its ranks and the layer types that it was made with.

    A plugin that came since does not change what "all" meant, nor how a layer is adapted.
    """
    plan = make_plan(model, config, registry.with_layer_types(manifest["layer_types"]), restoring=True)
    ranks = manifest.get("ranks")
    return plan.with_ranks(ranks) if ranks else plan


@contextmanager
def _misfit_told() -> Iterator[None]:
    """Turns an error about a config into one about the file that the config came from."""
    try:
        yield
    except AdapterFileError:
        raise
    except (LoraError, TypeError) as error:
        raise AdapterFileError(f"The adapter does not fit this model: {error}") from error


def rebuilt_bases(
    model: nn.Module, unpacked: NewAdapter, packed: PackedAdapter, registry: Registry | None
) -> dict[str, Tensor]:
    """Computes by full name the weights that the adapter's init replaces, bit for bit as in its training.

    Raises:
        AdapterFileError: If a recipe is damaged, or a weight differs in a bit.
    """
    with versions_told(packed.manifest, registry or registry_of(unpacked.plan.config)):
        return _rebuilt(model, unpacked, packed.manifest["changed"])


def _rebuilt(model: nn.Module, unpacked: NewAdapter, sums: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        changed = changed_bases(model, unpacked.plan, unpacked.content)
    except Exception as error:  # an init may trip over a damaged recipe in any way
        raise AdapterFileError(
            f"The init {unpacked.plan.init.name!r} could not compute the changed base from what is stored with the "
            f"adapter: {type(error).__name__}: {sentence(error)} Copy the adapter again."
        ) from error
    _difference("changed base", sums, changed, "the manifest", "what the init changes")
    wrong = [name for name, tensor in changed.items() if not has_checksum(tensor, str(sums.get(name)))]
    if wrong:
        raise AdapterFileError(
            f"The changed base of {listing(wrong)} could not be rebuilt bit for bit: the model's weights or their type "
            "are not those that the adapter was made from. Load the original base in its original type."
        )
    return changed


def _compare_tensors(expected: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    _difference("tensor", expected, tensors, "the manifest", "the file")
    for key, tensor in tensors.items():
        if (found := tensor_entry(tensor)) != expected[key]:
            raise AdapterFileError(f"The tensor {key!r} is {found}, but the manifest says {expected[key]}.")


def _compare_layers(expected: Mapping[str, Any], plan: Plan) -> None:
    layers = {layer.name: layer for layer in plan.layers}
    _difference("layer", expected, layers, "the adapter", "this model")
    for name, layer in layers.items():
        found = {
            "plugin": layer.plugin.name,
            "r": layer.r,
            "scaling": layer.scaling,
            "slots": [[slot.tensor, slot.part] for slot in layer.slots],
        }
        for key, value in found.items():
            if expected[name].get(key) != value:
                raise AdapterFileError(
                    f"The layer {name!r} has {key} {expected[name].get(key)!r} in the adapter and would have "
                    f"{value!r} on this model."
                )


def _compare_keys(
    model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Compares keys, shapes and kinds of all tensors, the recipes that were found among them included."""
    needed: dict[str, tuple[list[int], bool]] = {}
    for layer, slot, (rows, columns) in plan.slots():
        needed[tensor_key(layer, slot, "A")] = [layer.r, columns], True
        needed[tensor_key(layer, slot, "B")] = [rows, layer.r], True
        for name, shape in layer.own_shapes(slot).items():
            needed[tensor_key(layer, slot, name)] = list(shape), True
    for name in plan.saved_in_place:
        tensor = own_tensor(model, name)
        needed[value_key(name)] = list(tensor.shape), tensor.is_floating_point()
    prefixes = [prefix for layer, slot, _ in plan.slots() if (prefix := recipe_prefix(layer, slot)) in found]
    of_recipes = {prefix + name for prefix in prefixes for name in found[prefix]}
    _difference("tensor", {*needed, *of_recipes}, tensors, "this model", "the adapter")
    for key, (expected, floating) in needed.items():
        tensor = tensors[key]
        if list(tensor.shape) != expected:
            raise AdapterFileError(f"The tensor {key!r} is {list(tensor.shape)}; this model needs {expected}.")
        if tensor.is_floating_point() != floating:
            kind = "a floating" if floating else "an integer"
            raise AdapterFileError(f"The tensor {key!r} has the type {tensor.dtype}; this model needs {kind} one.")


def _compare_base(expected: Mapping[str, dict[str, float]], found: Mapping[str, dict[str, float]]) -> None:
    _difference("weight", expected, found, "the adapter", "this model")
    wrong = [name for name, value in found.items() if not same(value, expected[name])]
    if wrong:
        raise AdapterFileError(
            f"The adapter was trained on another base: {listing(wrong)} differ from the weights it was made for "
            f"({len(wrong)} of {len(found)} weights). Load the base model's own pretrained weights first, unmerged."
        )


def _difference(what: str, expected: Iterable[str], found: Iterable[str], here: str, there: str) -> None:
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or surplus:
        raise AdapterFileError(
            f"{here} and {there} differ: {counted(len(missing), what)} only in {here} ({listing(missing) or 'none'}), "
            f"{len(surplus)} only in {there} ({listing(surplus) or 'none'})."
        )
