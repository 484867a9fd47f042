"""Files of tensors and of JSON that others wrote: sizes are checked before anything is allocated, nothing is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lora_plugins.errors import AdapterFileError
from lora_plugins.utils import read_unmixed, replace_file, replace_files
from lora_plugins.writable import check_writable_file

LARGEST_HEADER = 16 << 20
"""Bytes of JSON that a file may hold: a hundred times those of an adapter for the largest models."""


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: type, shape and place of each tensor, and its metadata.

    Raises:
        AdapterFileError: If it is no such file, or says something that its size forbids.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            available = path.stat().st_size - 8
            if not 2 <= size <= min(available, LARGEST_HEADER):
                said = f"its header would have {size:,} bytes, and the file has {max(available, 0):,}"
                raise _damaged(path, f"{said}; at most {LARGEST_HEADER:,} are read")
            header = json.loads(file.read(size))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise _damaged(path, "its header is no table of tensors")
    return header


def _damaged(path: Path, why: object) -> AdapterFileError:
    return AdapterFileError(f"{path} is not a safetensors file, or it is damaged: {why}. Copy it again.")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Returns the tensors of a safetensors file and its metadata.

    Raises:
        AdapterFileError: As `read_header` does.
    """
    return read_unmixed(path, lambda: _read_tensors(path))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    metadata = read_header(path).get("__metadata__", {})
    try:
        return safetensors.torch.load(path.read_bytes()), metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of a safetensors file, without reading these; none if it is no such file."""
    try:
        header = read_header(path)
    except AdapterFileError:
        return {}
    shapes = {key: entry.get("shape") for key, entry in header.items() if key != "__metadata__"}
    return {
        key: tuple(shape)
        for key, shape in shapes.items()
        if isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    }


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Returns the object that a text holds, which messages call `what`.

    Raises:
        AdapterFileError: If it is not one.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what} cannot be read as JSON: {error}. Copy the file again.") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{what} does not hold a JSON object. Copy the file again.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
        AdapterFileError: If it is missing, too large or not one.
    """
    try:
        if path.stat().st_size > LARGEST_HEADER:
            raise AdapterFileError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST_HEADER:,} are read.")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; the old one stays until the new one is whole.

    Raises:
        ConfigError: If nothing can be written there, or a folder has that name.
    """
    check_writable_file(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _as_safetensors(tensors, metadata))


def write_described_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Path, content: Mapping[str, Any]
) -> None:
    """Writes a safetensors file and, beside it, its JSON config; an old file is never left with a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: _as_safetensors(tensors, metadata), config: json.dumps(content, indent=2).encode()})


def _as_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a file, the same each time: safetensors itself writes the metadata in any order."""
    # Copies, since safetensors refuses tensors that share memory, and one A may stand for two layers.
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    data = safetensors.torch.save(own, dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin where they are aligned
    return len(text).to_bytes(8, "little") + text + data[end:]
