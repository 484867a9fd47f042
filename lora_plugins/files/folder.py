"""Adapter folders.

A folder holds `adapter.json`, the manifest, and the safetensors file that the manifest names. The manifest says what
is in the file, exactly; loading compares it with the file and with the model before anything is touched. Tensors are
written first, under a name made of their contents, then the manifest replaces the old one: a process that is killed
leaves the old adapter or the new one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from lora_plugins.errors import AdapterFileError, nothing_there
from lora_plugins.files.manifest import TENSOR_FILE, checked_manifest, is_as_written, sealed
from lora_plugins.files.tensor_bytes import from_file, to_file
from lora_plugins.names import MANIFEST
from lora_plugins.plugins import PackedAdapter
from lora_plugins.utils import check_regular, ending, read_unmixed, remove_leftovers, replace_file
from lora_plugins.writable import check_writable_folder

_WRITTEN = re.compile(f"{TENSOR_FILE.pattern}|{re.escape(MANIFEST)}")
"""The names of the files in an adapter folder."""


def write(folder: Path, packed: PackedAdapter) -> Path:
    """Writes an adapter into a folder, replacing the one that is there; returns the folder.

    Raises:
        ConfigError: If the path is a file, or nothing can be written there.
    """
    check_writable_folder(folder, "path")
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({key: to_file(tensor) for key, tensor in packed.tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"adapter-{digest[:16]}.safetensors"
    manifest = {**packed.manifest, "file": name, "sha256": digest}
    others = [path for path in folder.iterdir() if path.name != name and TENSOR_FILE.fullmatch(path.name)]
    own = [] if (folder / name).exists() else [folder / name]
    with ending(lambda: _remove(others if _names(folder / MANIFEST, name) else own)):
        replace_file(folder / name, data)
        replace_file(folder / MANIFEST, json.dumps(sealed(manifest), indent=1).encode())
    remove_leftovers(folder, _WRITTEN)
    return folder


def _names(manifest: Path, tensor_file: str) -> bool:
    """Whether the manifest that is in its place names a tensor file."""
    return manifest.is_file() and json.dumps(tensor_file).encode() in manifest.read_bytes()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def read(folder: Path) -> PackedAdapter:
    """Reads an adapter folder.

    Raises:
        AdapterFileError: If a file is missing, truncated or changed, or the manifest points out of the folder.
    """
    return read_unmixed(folder / MANIFEST, lambda: _read(folder))


def _read(folder: Path) -> PackedAdapter:
    manifest = checked_manifest(_read_manifest(folder / MANIFEST))
    if not is_as_written(manifest):
        raise AdapterFileError(
            f"{folder / MANIFEST} is not what was written: it was damaged or edited. Copy the adapter folder again; "
            "what an adapter is cannot be changed by editing its manifest."
        )
    name = manifest.get("file")
    if not isinstance(name, str) or not TENSOR_FILE.fullmatch(name):
        raise AdapterFileError(
            f"{folder / MANIFEST}: 'file' is {name!r}, which is not the name of a tensor file in the folder. Copy the "
            "adapter folder again."
        )
    path = folder / name
    try:
        check_regular(path)
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise AdapterFileError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}. Copy the whole adapter folder again."
        ) from error
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise AdapterFileError(
            f"{path} is not the file that {MANIFEST} describes: it was truncated or changed. Copy the folder again."
        )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is not a safetensors file: {error}.") from error
    said = manifest["tensors"]
    return PackedAdapter(manifest, {key: from_file(tensor, said.get(key)) for key, tensor in tensors.items()})


def _read_manifest(path: Path) -> Mapping[str, Any]:
    try:
        check_regular(path)
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AdapterFileError(
            f"{path} does not exist: {nothing_there(path)} An adapter is the folder that save_adapter wrote."
        ) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}. Copy the adapter folder again.") from error
    if not isinstance(manifest, dict):
        raise AdapterFileError(f"{path} does not hold a JSON object. Copy the adapter folder again.")
    return manifest
