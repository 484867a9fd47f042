"""Checkpoints that are one file: it is written under a temporary name, so that its own has a whole one or none."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lora_plugins.utils import take_permissions


def save_file(
    trainer: Trainer, checkpoint: dict[str, Any], filepath: Any, write: Callable[..., None], **options: Any
) -> None:
    """Writes a checkpoint; where the strategy writes one local file, under a temporary name that is renamed then.

    `write` is the strategy's own method, and `options` are its further arguments.
    """
    if not _is_plain_file(trainer.strategy, filepath):
        write(checkpoint, filepath, **options)
        return
    path = Path(filepath)
    partial = partial_path(path)
    try:
        write(checkpoint, partial, **options)
        if trainer.is_global_zero:
            _flush(partial)
            take_permissions(path, partial)
            os.replace(partial, path)
    except BaseException as error:
        if trainer.is_global_zero:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            places = {Path(name).name for name in (error.filename, error.filename2) if name is not None}
            if not places or partial.name in places:  # fsspec's name none, or one that nobody has given
                error.filename = str(path)
                del error.filename2
        raise


def partial_path(path: Path) -> Path:
    """Returns the path under which a checkpoint is written, beside its own.

    Its name has none of that in it: Lightning takes the number in any name with `hpc_ckpt_` for that of a checkpoint to
    go on from, also of one that a killed process has left. And it is short, whatever its own is.
    """
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial")


def _is_plain_file(strategy: Strategy, path: Any) -> bool:
    """Whether the strategy writes one local file by the time that its save_checkpoint returns."""
    return type(strategy.checkpoint_io) is TorchCheckpointIO and "://" not in str(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
