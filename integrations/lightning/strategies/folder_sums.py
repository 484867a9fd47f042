"""Checksums of the files in the folder of a distributed checkpoint, which torch reads without comparing any."""

import hashlib
import json
from pathlib import Path

from lora_plugins import AdapterFileError
from lora_plugins.errors import listing

_SUMS = "sums.json"
"""The file that holds them."""


def write_sums(folder: Path) -> None:
    """Writes the checksum of each file in a folder beside them."""
    (folder / _SUMS).write_text(json.dumps({path.name: _sum(path) for path in sorted(folder.iterdir())}, indent=1))


def check_sums(folder: Path) -> None:
    """Compares the files in a folder with their checksums.

    Raises:
        AdapterFileError: If a file is missing or is not what was written.
    """
    if not (folder / _SUMS).is_file():
        raise AdapterFileError(
            f"{folder} has no {_SUMS}: it is not whole, or was written without a LoraCallback. Copy it again, or "
            "remove the LoraCallback to load it."
        )
    sums = json.loads((folder / _SUMS).read_text())
    damaged = [name for name, written in sums.items() if not _is_as_written(folder / name, written)]
    if damaged:
        raise AdapterFileError(
            f"{folder} is damaged: {listing(damaged)} in it are missing or not what was written. Use another one."
        )


def _is_as_written(path: Path, written: str) -> bool:
    return path.is_file() and _sum(path) == written


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
