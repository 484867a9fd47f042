"""The data module that all data modules here inherit from."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from lora_plugins import ConfigError
from lora_plugins.field_checks import check_count, choice_of, whole_from
from lora_plugins.tasks.data.transforms import Size
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import TEST, TRAIN, VAL, leaves_one

SHUFFLE, BALANCED = "shuffle", "balanced"
SAMPLERS = (SHUFFLE, BALANCED)


class VisionDataModule(LightningDataModule):
    """A data module with up to three splits: train, val and test.

    Prediction reads the test split, or the val split if there is no test split.

    Args:
        batch_size: Samples per batch.
        num_workers: Worker processes that load data; 0 loads in the training process.
        sampler: `shuffle`, or `balanced` to draw each class equally often, for samples with one class each.

    Attributes:
        ignore_index: The label that stands for no class; None if there is no such label.
        interpolation: How images are resized; None for what the model says, or if they are not.

    Raises:
        ConfigError: If an argument is invalid.
    """

    ignore_index: int | None = None
    interpolation: str | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, sampler: str = SHUFFLE) -> None:
        super().__init__()
        check_count("batch_size", batch_size)
        whole_from(0)("num_workers", num_workers)
        choice_of(*SAMPLERS)("sampler", sampler)
        self.batch_size, self.num_workers, self.sampler = batch_size, num_workers, sampler
        self.splits: dict[str, Dataset[Any]] = {}
        self._counted: tuple[Dataset[Any], Tensor] | None = None

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""

    @abstractmethod
    def load(self) -> dict[str, Dataset[Any]]:
        """Makes the data sets by split, after all checks."""

    def size(self) -> Size | None:
        """Height and width of the images; None if they differ."""
        return None

    def setup(self, stage: str) -> None:
        """Loads the splits, once."""
        self.splits = self.splits or self.load()

    def train_dataloader(self) -> DataLoader[Any]:
        """Samples of the train split, in random order.

        A last batch of a single sample is dropped: batch statistics of one value are not defined.
        """
        return self._loader(TRAIN)

    def val_dataloader(self) -> DataLoader[Any]:
        """Samples of the val split, in order."""
        return self._loader(VAL)

    def test_dataloader(self) -> DataLoader[Any]:
        """Samples of the test split, in order."""
        return self._loader(TEST)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Samples of the test split, or of the val split if there is no test split."""
        return self._loader(TEST if TEST in self.splits else VAL)

    def class_counts(self) -> Tensor:
        """How often each class occurs in the train split, (classes,): in samples, or in pixels of their masks.

        A data set is counted once: every run of a task with balanced weights asks, and masks are read from disk. One
        that is changed in place is not counted again.
        """
        data = self.splits[TRAIN]
        if self._counted is None or self._counted[0] is not data:
            counts = torch.zeros(len(self.class_names), dtype=torch.long)
            for target in self.targets(TRAIN):
                counted = target if self.ignore_index is None else target[target != self.ignore_index]
                counts += torch.bincount(counted, minlength=len(counts))
            self._counted = data, counts
        return self._counted[1].clone()

    def targets(self, split: str) -> Iterator[Tensor]:
        """The targets of a split, sample by sample, flattened."""
        for sample in cast(Any, self.splits[split]):
            yield torch.as_tensor(sample["target"]).reshape(-1)

    def _loader(self, split: str) -> DataLoader[Any]:
        if split not in self.splits:
            raise DataError(f"{type(self).__name__} has no {split} split, only {', '.join(self.splits)}.")
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **(self._sampling() if split == TRAIN else {}),
        )

    def _sampling(self) -> dict[str, Any]:
        size = len(cast(Any, self.splits[TRAIN]))
        share = math.ceil(size / (self.trainer.world_size if self.trainer is not None else 1))  # of each process
        drop = {"drop_last": leaves_one(share, self.batch_size)}
        if self.sampler == SHUFFLE:
            return {"shuffle": True, **drop}
        labels = list(self.targets(TRAIN))
        if any(len(label) != 1 for label in labels):
            raise ConfigError("sampler is 'balanced', which needs one class a sample; masks have many.")
        flat = torch.cat(labels)
        weights = 1 / torch.bincount(flat).clamp(min=1)
        return {"sampler": WeightedRandomSampler(weights[flat].tolist(), size), **drop}
