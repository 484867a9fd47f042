"""Reads checkpoints without unpickling objects, and recognizes damaged files."""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lora_plugins import AdapterFileError
from lora_plugins.errors import LoraError, listing, sentence
from lora_plugins.integrations.lightning.checkpoint.entry import KEY
from lora_plugins.integrations.lightning.checkpoint.objects import (
    Global,
    allowed,
    need_unpickling,
    not_allowed,
)
from lora_plugins.integrations.lightning.checkpoint.rebuilding import original
from lora_plugins.utils import check_regular

_PICKLE = "data.pkl"
"""The end of the name of the record that says what else is in a checkpoint."""

_WEB = ("http://", "https://")
"""Where Lightning downloads a checkpoint from, each time that it reads it."""


@contextmanager
def reading_errors(path: object) -> Iterator[None]:
    """Turns what is raised while a damaged file is read into an error that names the file.

    Raises:
        AdapterFileError: If what is read inside the block is not a whole checkpoint.
    """
    try:
        if isinstance(path, str | Path):
            check_regular(Path(path))
        yield
    except (FileNotFoundError, LoraError):
        raise
    except IsADirectoryError as error:
        raise AdapterFileError(
            f"{path} is a folder, and a checkpoint is a file here. Strategies that shard parameters write folders, and "
            "read them; ModelParallelStrategy(save_distributed_checkpoint=False) writes one file. An adapter folder is "
            "for LoraModel.load_adapter."
        ) from error
    except UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # a flipped bit in a pickle ends in almost any of them
        raise damaged(path, error) from error


def _refused(path: object, error: UnpicklingError) -> AdapterFileError:
    """Returns the error for a file with objects that torch does not read, or that is damaged."""
    objects = not_allowed(path)
    if objects is None:
        return damaged(path, error)
    if objects and not need_unpickling(objects):
        return AdapterFileError(
            f"{path} holds objects that must be allowed before they are read: {listing(objects)}. If you trust the "
            f"source of the file, allow them by allow_globals={objects!r} of load_from_checkpoint, merge_checkpoint "
            "and export_checkpoint, or --allow-globals of the commands; a Trainer takes weights_only=False beside "
            "ckpt_path."
        )
    nested = f"among them a class inside of another one, or a method: {listing(objects)}."
    reason = nested if objects else f"though their types are allowed: {_reason(error)}"
    return AdapterFileError(
        f"{path} holds objects that can only be read by unpickling them, {reason} If you trust the source of the "
        "file, load_from_checkpoint, merge_checkpoint, export_checkpoint and a Trainer, beside ckpt_path, take "
        "weights_only=False."
    )


def _reason(error: UnpicklingError) -> str:
    """Returns the sentences of torch's long message that say why it failed."""
    said = str(error)
    lines = [line.strip() for line in said[max(said.find("WeightsUnpickler error"), 0) :].splitlines() if line.strip()]
    return " ".join(line for line in lines[:2] if "Check the documentation" not in line)


def damaged(path: object, error: Exception) -> AdapterFileError:
    """Returns the error for a file that cannot be read."""
    said = _reason(error) if isinstance(error, UnpicklingError) else error
    return AdapterFileError(
        f"{path} cannot be read as a checkpoint: {type(error).__name__}: {sentence(said)} It may be truncated or "
        "damaged, or of another kind: use another one."
    )


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", allow_globals: Sequence[Global] = (), *, weights_only: bool = True
) -> dict[str, Any]:
    """Reads a checkpoint without unpickling objects, but those of harmless types and of types that are allowed.

    The arguments are those of `load_from_checkpoint`.

    Raises:
        AdapterFileError: If it is not a file that `torch.load(weights_only=True)` can read, or it is damaged.
        ConfigError: If what is allowed cannot be imported.
    """
    with allowed(allow_globals), reading_errors(path):
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only)
    check_whole(path, checkpoint)
    return original(checkpoint) if KEY in checkpoint else dict(checkpoint)


def check_whole(path: object, checkpoint: Any) -> None:
    """Checks the sums of a file that torch wrote, which `torch.load` does not do.

    Addresses of the web are not read a second time. Of a checkpoint without adapters, which may be large and is not
    ours, only the record is read that would say if there were some.

    Raises:
        AdapterFileError: If a part of the file is not what was written, or it is no checkpoint.
    """
    if not isinstance(checkpoint, dict):
        raise AdapterFileError(f"{path} is not a checkpoint of Lightning.")
    if not isinstance(path, str | Path) or str(path).startswith(_WEB):
        return
    files = get_filesystem(path)
    if not files.isfile(str(path)):
        return
    with reading_errors(path), files.open(str(path), "rb") as stream:
        if not zipfile.is_zipfile(stream):
            return  # of a release of torch that wrote no zip files
        with zipfile.ZipFile(stream) as file:
            names = [name for name in file.namelist() if KEY in checkpoint or name.endswith(_PICKLE)]
            broken = [name for name in names if not _is_whole(file, name)]
            # torch writes no sums at all after torch.serialization.set_crc32_options(False).
            if broken and any(_is_whole(file, name) for name in file.namelist()):
                raise AdapterFileError(
                    f"{path} is damaged: {listing(broken)} in it are not what was written. Use another checkpoint."
                )


def _is_whole(file: zipfile.ZipFile, name: str) -> bool:
    try:
        with file.open(name) as record:
            while record.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True
