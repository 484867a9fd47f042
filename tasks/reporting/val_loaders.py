"""The loaders of the val split after a fit, whose samples are read again."""

from collections.abc import Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.training import VisionTask


def first_val_loader(trainer: Trainer) -> DataLoader[Any]:
    """The first loader of the val split, of a trainer that validates."""
    return first_loader(trainer.val_dataloaders)


def first_loader(loaders: Any) -> DataLoader[Any]:
    """The first of a split's loaders, which are held in a list or a dict, or are one alone."""
    return cast("DataLoader[Any]", CombinedLoader(loaders).flattened[0])


def has_places(loader: object) -> bool:
    """Whether samples can be read again by their place: those of a stream, or of mere batches, cannot."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def has_validated(trainer: Trainer, what: str) -> bool:
    """Whether a fit has validated; warns that there is none of `what` if not, as when it was over already."""
    validated = any(trainer.num_val_batches)
    if not validated:
        rank_zero_warn(f"There is no {what}: this fit validated nothing. It was over already, or has no val batches.")
    return validated


def samples_of(loader: DataLoader[Any], indices: Sequence[int]) -> Batch:
    """The samples of a loader at these places of its data set."""
    return Batch.read(loader.collate_fn([loader.dataset[index] for index in indices]))


def evenly_spaced(loader: DataLoader[Any], count: int) -> list[int]:
    """At most `count` evenly spaced places in the data set of a loader."""
    total = len(cast(Sized, loader.dataset))
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()]


def val_precision(task: VisionTask) -> AbstractContextManager[Any]:
    """The precision that the trainer of a task validates in, for forwards alone: it changes how data would be made."""
    return nullcontext() if task._trainer is None else task.trainer.precision_plugin.val_step_context()
