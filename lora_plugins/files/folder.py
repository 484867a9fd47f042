"""Adapter folders.

A folder holds `adapter.json`, the manifest, and the safetensors file that the manifest names. The manifest says what
is in the file, exactly; loading compares it with the file and with the model before anything is touched. Tensors are
written first, under a name made of their contents, then the manifest replaces the old one: a process that is killed
leaves the old adapter or the new one.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lora_plugins.adapter.attach import SlotTensors, changed_bases, slots
from lora_plugins.adapter.state import ModelState, base_in_place
from lora_plugins.config import LoraConfig
from lora_plugins.errors import AdapterFileError, LoraError, listing
from lora_plugins.files.fingerprint import KEYS, fingerprint, same
from lora_plugins.inplace.layer import factors, own_tensors_of, peek_weight
from lora_plugins.inplace.modules import full_name, own_tensor
from lora_plugins.plan.plan import Plan, PlannedLayer
from lora_plugins.plan.planner import make_plan
from lora_plugins.plugins.layer import Slot
from lora_plugins.plugins.manager import registry_of
from lora_plugins.plugins.registry import Registry

FORMAT = 1
"""Version of the manifest that this release writes, and the newest that it reads."""

MANIFEST = "adapter.json"
"""Name of the manifest in an adapter folder."""

ADAPTER_NAME = re.compile(r"\w[\w-]*")
"""What an adapter can be called."""

_TENSOR_FILE = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as plain data.

    Args:
        manifest: Plain types only: format version, config, layers with rank and scaling, tensors with type and shape,
            fingerprints of the base, versions.
        tensors: The tensors that the manifest lists.
    """

    manifest: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class UnpackedAdapter:
    """An adapter that was found to fit a model.

    Args:
        plan: What it adapts.
        content: Its factors by layer name and slot suffix.
        values: Its heads, biases and statistics by full name.
    """

    plan: Plan
    content: Mapping[tuple[str, str], SlotTensors]
    values: Mapping[str, Tensor]


def pack(model: nn.Module, state: ModelState, adapter_name: str, registry: Registry | None) -> PackedAdapter:
    """Returns an adapter of a model as plain data. The tensors are the model's own, not copies."""
    adapter = state.adapters[adapter_name]
    plan = adapter.plan
    registry = registry or registry_of(plan.config)
    tensors: dict[str, Tensor] = {}
    for layer, slot, _ in slots(plan):
        A, B = factors(model.get_submodule(layer.name), adapter_name, slot)
        own = own_tensors_of(model.get_submodule(layer.name), adapter_name, slot)
        for name, parameter in {"A": A, "B": B, **own}.items():
            tensors[_key(layer, slot, name)] = parameter.detach()
        for name, tensor in adapter.recipes[layer.name, slot.suffix].items():
            tensors[_recipe_prefix(layer, slot) + name] = tensor
    for name in (*plan.trained, *plan.saved_buffers):
        tensors[f"value/{name}"] = state.values.value(model, adapter_name, name)
    if not adapter.fingerprints:
        with base_in_place(model, state):
            adapter.fingerprints.update(_fingerprints(model, plan))
    manifest = {
        "format": FORMAT,
        "lora_plugins": metadata.version("lora-plugins"),
        "adapter_name": adapter_name,
        "config": plan.config.to_dict(),
        "init": {"name": plan.init.name, **_origin(registry.inits, plan.init.name)},
        "layers": {layer.name: _describe(layer, registry) for layer in plan.layers},
        **({"ranks": dict(plan.ranks)} if plan.ranks else {}),
        "tensors": {
            key: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for key, tensor in tensors.items()
        },
        "base": adapter.fingerprints,
        "changed": _changed(model, state, adapter_name),
    }
    return PackedAdapter(manifest, tensors)


def unpack(model: nn.Module, packed: PackedAdapter, registry: Registry | None) -> UnpackedAdapter:
    """Checks an adapter against a model; touches nothing.

    Args:
        model: The model, with the base's own values in place.
        packed: The adapter.
        registry: The plugins to use; by default those that the adapter's config lets load.

    Raises:
        AdapterFileError: If the manifest is damaged or newer, tensors are missing, surplus or of another shape, or the
            model is not the one the adapter was made for.
    """
    manifest = _checked(packed.manifest)
    _compare_tensors(manifest["tensors"], packed.tensors)
    try:
        plan = make_plan(model, LoraConfig.from_dict(manifest["config"]), registry)
        plan = plan.with_ranks(manifest["ranks"]) if manifest.get("ranks") else plan
    except (LoraError, TypeError) as error:
        raise AdapterFileError(f"The adapter does not fit this model: {error}") from error
    _compare_layers(manifest["layers"], plan)
    _compare_keys(model, plan, packed.tensors)
    _compare_base(manifest["base"], _fingerprints(model, plan))
    content = {
        (layer.name, slot.suffix): SlotTensors(
            A=packed.tensors[_key(layer, slot, "A")],
            B=packed.tensors[_key(layer, slot, "B")],
            recipe=_recipe(plan, layer, slot, packed.tensors),
            own={name: packed.tensors[_key(layer, slot, name)] for name in _own_shapes(layer, slot)},
        )
        for layer, slot, _ in slots(plan)
    }
    values = {name: packed.tensors[f"value/{name}"] for name in (*plan.trained, *plan.saved_buffers)}
    return UnpackedAdapter(plan, content, values)


def write(folder: Path, packed: PackedAdapter) -> Path:
    """Writes an adapter into a folder, replacing the one that is there; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in packed.tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"adapter-{digest[:16]}.safetensors"
    manifest = {**packed.manifest, "file": name, "sha256": digest}
    replace_file(folder / name, data)
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != name:
            old.unlink()
    return folder


def read(folder: Path) -> PackedAdapter:
    """Reads an adapter folder.

    Raises:
        AdapterFileError: If a file is missing, truncated or changed, or the manifest points out of the folder.
    """
    manifest = _checked(_manifest(folder / MANIFEST))
    name = manifest.get("file")
    if not isinstance(name, str) or not _TENSOR_FILE.fullmatch(name):
        raise AdapterFileError(
            f"{folder / MANIFEST}: 'file' is {name!r}, which is not the name of a tensor file in the folder. Copy the "
            "adapter folder again."
        )
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be read: {error.strerror}. Copy the whole adapter folder again."
        ) from error
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise AdapterFileError(
            f"{path} is not the file that {MANIFEST} describes: it was truncated or changed. Copy the folder again."
        )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is not a safetensors file: {error}.") from error
    return PackedAdapter(manifest, tensors)


def saved_name(packed: PackedAdapter) -> str:
    """Returns the name that an adapter was saved under.

    Raises:
        AdapterFileError: If the manifest is damaged or newer.
    """
    return str(_checked(packed.manifest)["adapter_name"])


def rebuilt_bases(model: nn.Module, unpacked: UnpackedAdapter, packed: PackedAdapter) -> dict[str, Tensor]:
    """Computes the weights that the adapter's init replaces, by full name, bit for bit as it was trained on them.

    Raises:
        AdapterFileError: If a recipe is damaged, or a weight differs in a bit.
    """
    try:
        changed = changed_bases(model, unpacked.plan, unpacked.content)
    except Exception as error:  # an init may trip over a damaged recipe in any way
        raise AdapterFileError(
            f"The init {unpacked.plan.init.name!r} could not compute the changed base from what is stored with the "
            f"adapter: {type(error).__name__}: {error}. Copy the adapter again."
        ) from error
    sums = packed.manifest["changed"]
    wrong = [name for name, tensor in changed.items() if not _has_sum(tensor, str(sums.get(name)))]
    if wrong:
        raise AdapterFileError(
            f"The changed base of {listing(wrong)} could not be rebuilt bit for bit: the model's weights or their type "
            "are not those that the adapter was made from. Load the original base in its original type."
        )
    return changed


def _key(layer: PlannedLayer, slot: Slot, factor: str) -> str:
    return f"lora/{layer.name}/lora_{factor}{slot.suffix}"


def _own_shapes(layer: PlannedLayer, slot: Slot) -> Mapping[str, tuple[int, ...]]:
    return layer.own_shapes(layer.slots.index(slot))


def _recipe_prefix(layer: PlannedLayer, slot: Slot) -> str:
    return f"recipe/{layer.name}/{slot.part}/"


def _recipe(plan: Plan, layer: PlannedLayer, slot: Slot, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not plan.init.changes_base:
        return {}
    prefix = _recipe_prefix(layer, slot)
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in found.items() if "/" not in key}


def _describe(layer: PlannedLayer, registry: Registry) -> dict[str, Any]:
    return {
        "plugin": layer.plugin.name,
        **_origin(registry.layers, layer.plugin.name),
        "r": layer.r,
        "alpha": layer.alpha,
        "scaling": layer.scaling,
        "slots": [[slot.tensor, slot.part] for slot in layer.slots],
    }


def _origin(owners: Mapping[str, Any], name: str) -> dict[str, str]:
    owned = owners.get(name)
    return {"distribution": owned.info.distribution, "version": owned.info.version} if owned else {}


def _fingerprints(model: nn.Module, plan: Plan) -> dict[str, dict[str, float]]:
    return {
        full_name(layer.name, slot.tensor): fingerprint(peek_weight(model.get_submodule(layer.name), slot.tensor))
        for layer in plan.layers
        for slot in {slot.tensor: slot for slot in layer.slots}.values()
    }


def _changed(model: nn.Module, state: ModelState, adapter_name: str) -> dict[str, str]:
    plan = state.adapters[adapter_name].plan
    own = {*plan.trained, *plan.saved_buffers}
    names = [name for name in state.values.values.get(adapter_name, {}) if name not in own]
    return {name: _sum(state.values.value(model, adapter_name, name)) for name in names}


def _sum(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


def _has_sum(tensor: Tensor, expected: str) -> bool:
    """Whether a tensor is the one of that sum, once it is cast as the model may have been since (`bf16-true`)."""
    dtype = getattr(torch, expected.partition(":")[0], None)
    return isinstance(dtype, torch.dtype) and _sum(tensor.to(dtype)) == expected


def _manifest(path: Path) -> Mapping[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AdapterFileError(f"{path} does not exist. An adapter is the folder that save_adapter wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}. Copy the adapter folder again.") from error
    if not isinstance(manifest, dict):
        raise AdapterFileError(f"{path} does not hold a JSON object. Copy the adapter folder again.")
    return manifest


def _checked(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuses a manifest of a newer format, and one that lacks an entry or has one of another type."""
    version = manifest.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise AdapterFileError(f"The manifest has the format version {version!r}; it is not one of lora_plugins.")
    if version > FORMAT:
        raise AdapterFileError(
            f"The adapter has format {version}, and this lora_plugins {metadata.version('lora-plugins')} reads up to "
            f"{FORMAT}. It was written by lora_plugins {manifest.get('lora_plugins')}: upgrade to that."
        )
    for key, is_proper in _ENTRIES.items():
        if not is_proper(manifest.get(key)):
            raise AdapterFileError(f"The manifest has no proper entry {key!r}; it is damaged. Copy the adapter again.")
    return manifest


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and ADAPTER_NAME.fullmatch(value) is not None


def _maps_to(is_proper: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_proper, value.values()))


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_fingerprint(value: Any) -> bool:
    is_map = isinstance(value, dict) and value.keys() == set(KEYS)
    return is_map and all(isinstance(number, float) for number in value.values())


_ENTRIES: Mapping[str, Callable[[Any], bool]] = {
    "adapter_name": _is_name,
    "config": lambda value: isinstance(value, dict),
    "layers": _maps_to(lambda layer: isinstance(layer, dict)),
    "ranks": lambda value: value is None or _maps_to(_is_rank)(value),
    "tensors": lambda value: isinstance(value, dict),
    "base": _maps_to(_is_fingerprint),
    "changed": lambda value: isinstance(value, dict),
}


def _compare_tensors(expected: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    _difference("tensor", expected, tensors, "the manifest", "the file")
    for key, tensor in tensors.items():
        found = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if found != expected[key]:
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


def _compare_keys(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    needed: dict[str, tuple[list[int], bool]] = {}
    for layer, slot, (rows, columns) in slots(plan):
        needed[_key(layer, slot, "A")] = [layer.r, columns], True
        needed[_key(layer, slot, "B")] = [rows, layer.r], True
        for name, shape in _own_shapes(layer, slot).items():
            needed[_key(layer, slot, name)] = list(shape), True
    for name in (*plan.trained, *plan.saved_buffers):
        tensor = own_tensor(model, name)
        needed[f"value/{name}"] = list(tensor.shape), tensor.is_floating_point()
    recipes = {
        _recipe_prefix(layer, slot) + key
        for layer, slot, _ in slots(plan)
        for key in _recipe(plan, layer, slot, tensors)
    }
    _difference("tensor", {*needed, *recipes}, tensors, "this model", "the adapter")
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
            f"{here} and {there} differ: {len(missing)} {what}s only in {here} ({listing(missing) or 'none'}), "
            f"{len(surplus)} only in {there} ({listing(surplus) or 'none'})."
        )


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that a process killed at any moment leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
