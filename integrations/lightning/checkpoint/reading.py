"""Reads checkpoints without unpickling objects, and says of a damaged file that it is damaged."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_plugins import AdapterFileError


@contextmanager
def reading_errors(path: object) -> Iterator[None]:
    """Turns what torch raises while it reads a damaged file into an error that names the file.

    Raises:
        AdapterFileError: If what is read inside the block is not a whole checkpoint.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise AdapterFileError(
            f"{path} cannot be read as a checkpoint: {error}. It may be truncated: use another one."
        ) from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint without unpickling objects.

    Raises:
        AdapterFileError: If it is not a file that `torch.load(weights_only=True)` can read.
    """
    with reading_errors(path):
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(checkpoint, dict):
        raise AdapterFileError(f"{path} is not a checkpoint of Lightning.")
    return checkpoint
