"""The manifest of an adapter: its format, the keys of the tensors that it lists, and what its entries have to be."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from torch import Tensor

from lora_plugins.adapter import ADAPTER_NAME
from lora_plugins.errors import AdapterFileError
from lora_plugins.field_checks import MAX_RANK, is_whole
from lora_plugins.files.fingerprint import KEYS
from lora_plugins.names import DISTRIBUTION
from lora_plugins.plugins import PlannedLayer, Slot

FORMAT = 1
"""Version of the manifest that this release writes, and the newest that it reads."""

_SEAL = "manifest_sha256"
"""The manifest's entry for its own checksum."""

TENSOR_FILE = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")
TENSOR_FILES = f"adapter-{'[0-9a-f]' * 16}.safetensors"
"""The name of a tensor file, after the first digits of its checksum; as a shell pattern in `TENSOR_FILES`."""


def tensor_key(layer: PlannedLayer, slot: Slot, factor: str) -> str:
    """Returns the key of a factor, or of a tensor that is the variant's own."""
    return f"lora/{layer.name}/lora_{factor}{slot.suffix}"


def recipe_prefix(layer: PlannedLayer, slot: Slot) -> str:
    """Returns what the keys of a slot's recipe start with."""
    return f"recipe/{layer.name}/{slot.part}/"


def recipes(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns every recipe among the tensors of an adapter, by what `recipe_prefix` says of its slot."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("recipe/"):
            prefix, slash, name = key.rpartition("/")
            found.setdefault(prefix + slash, {})[name] = tensor
    return found


def value_key(name: str) -> str:
    """Returns the key of a head, bias or statistic, by its full name in the model."""
    return f"value/{name}"


def tensor_entry(tensor: Tensor) -> dict[str, Any]:
    """Returns what a manifest says of a tensor."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest with the checksum of all its other entries, which tells when one of them is changed."""
    entries = {key: value for key, value in manifest.items() if key != _SEAL}
    canonical = json.dumps(json.loads(json.dumps(entries)), sort_keys=True, separators=(",", ":"))
    return {**entries, _SEAL: hashlib.sha256(canonical.encode()).hexdigest()}


def is_as_written(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest read from a file is the one that was written."""
    try:
        return bool(manifest.get(_SEAL) == sealed(manifest)[_SEAL])
    except RecursionError:  # of entries nested deeper than anything that is written
        return False


def checked_manifest(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuses a manifest of a newer format, and one that lacks an entry or has one of another type."""
    version = manifest.get("format")
    if not is_whole(version) or version < 1:
        raise AdapterFileError(f"The manifest has the format version {version!r}; it is not one of lora_plugins.")
    if version > FORMAT:
        raise AdapterFileError(
            f"The adapter has format {version}, and this lora_plugins {metadata.version(DISTRIBUTION)} reads up to "
            f"{FORMAT}. It was written by lora_plugins {manifest.get('lora_plugins')}: upgrade to that."
        )
    for key, is_proper in _ENTRIES.items():
        if not is_proper(manifest.get(key)):
            raise AdapterFileError(f"The manifest has no proper entry {key!r}; it is damaged. Copy the adapter again.")
    return manifest


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and ADAPTER_NAME.fullmatch(value) is not None


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _tells(key: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and isinstance(value.get(key), str)


def _maps_to(is_proper: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_proper, value.values()))


def _is_fingerprint(value: Any) -> bool:
    is_map = isinstance(value, dict) and value.keys() == set(KEYS)
    return is_map and all(isinstance(number, float) for number in value.values())


_ENTRIES: Mapping[str, Callable[[Any], bool]] = {
    "adapter_name": _is_name,
    "config": lambda value: isinstance(value, dict),
    "init": _tells("name"),
    "variant": _tells("name"),
    "layer_types": _is_list_of_names,
    "layers": _maps_to(_tells("plugin")),
    "ranks": lambda value: value is None or _maps_to(lambda rank: is_whole(rank) and 0 <= rank <= MAX_RANK)(value),
    "tensors": lambda value: isinstance(value, dict),
    "base": _maps_to(_is_fingerprint),
    "changed": lambda value: isinstance(value, dict),
    "stored": lambda value: value is None or _maps_to(lambda entry: isinstance(entry, dict))(value),
}

OWN_ENTRIES = frozenset({*_ENTRIES, "format", "lora_plugins", "file", "sha256", _SEAL})
"""The names of all entries that a manifest can have; others are what users add."""
