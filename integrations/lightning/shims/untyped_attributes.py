"""Attributes of the Trainer that the types of Lightning 2.6.6 lack: its connectors set them."""

from typing import Any, cast

from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a trainer, in their order."""
    return cast(list[Callback], cast(Any, trainer).callbacks)


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether a run is one of a few batches, to find mistakes, that leaves no files."""
    return bool(cast(Any, trainer).fast_dev_run)
