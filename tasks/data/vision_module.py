"""Samples, batches and the data module that all of ours share.

A sample is a dict: `image`, float in [0, 1], (channels, H, W); `target`, a class index or an (H, W) mask of
them; `name`, the file or the scene it comes from, so that an error can say where. Tasks also take plain
(image, target) pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from lora_plugins import ConfigError
from lora_plugins.tasks.data.transforms import Size
from lora_plugins.tasks.errors import DataError, unknown

TRAIN, VAL, TEST = "train", "val", "test"
SHUFFLE, BALANCED = "shuffle", "balanced"
SAMPLERS = (SHUFFLE, BALANCED)


@dataclass(frozen=True)
class Batch:
    """A batch of images with what is known of them.

    Attributes:
        images: (N, channels, H, W), float in [0, 1].
        targets: (N,) class indices or (N, H, W) masks, or None where there are none (prediction).
        names: Where each image comes from, or None where the data set does not say.
    """

    images: Tensor
    targets: Tensor | None
    names: Sequence[str] | None

    @classmethod
    def read(cls, batch: Any) -> Self:
        """Read a batch as a data loader gives it: a dict of ours, a tensor, or an (image, target) pair.

        Raises:
            DataError: For anything else.
        """
        match batch:
            case Tensor():
                return cls(batch, None, None)
            case {"image": Tensor() as images}:
                return cls(images, batch.get("target"), batch.get("name"))
            case [Tensor() as images, Tensor() as targets]:
                return cls(images, targets, None)
        shape = f"with the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise DataError(
            f"The data loader gave a {type(batch).__name__} {shape}; a task needs a dict with `image` and `target`, a "
            "pair (image, target), or a tensor of images."
        )


def check_targets(batch: Batch, num_classes: int, ignore_index: int) -> Tensor:
    """The targets of a batch, all of them in [0, num_classes) or equal to `ignore_index`.

    Raises:
        DataError: Where there are no targets, or with each label out of range and the file that holds it.
    """
    if batch.targets is None:
        raise DataError("The batch has images but no targets; only prediction works without.")
    wrong = (batch.targets != ignore_index) & ((batch.targets < 0) | (batch.targets >= num_classes))
    if not wrong.any():
        return batch.targets
    values = sorted(set(batch.targets[wrong].tolist()))
    rows = wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong
    names = batch.names or [f"sample {i} of the batch" for i in range(len(rows))]
    where = ", ".join(name for name, bad in zip(names, rows.tolist(), strict=True) if bad)
    raise DataError(
        f"Label {', '.join(map(str, values))} in {where}: labels are 0 to {num_classes - 1}, or {ignore_index} for "
        "what loss and metrics should ignore (`ignore_index` of the task)."
    )


class TensorSamples(Dataset[dict[str, Any]]):
    """Samples that are held in memory.

    Args:
        images: (N, channels, H, W), 8-bit.
        targets: (N,) class indices or (N, H, W) masks of them.
        names: A name for each sample.
    """

    def __init__(self, images: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        self.images, self.targets, self.names = images, targets, names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self.images[index].float() / 255,
            "target": self.targets[index],
            "name": self.names[index],
        }


class VisionDataModule(LightningDataModule):
    """A data module over up to three splits, called train, val and test.

    Prediction reads the test split, or the val split where there is no test split.

    Args:
        batch_size: Samples a batch.
        num_workers: Processes that load data; 0 loads in the training process.
        sampler: `shuffle`, or `balanced` to draw each class equally often, where samples have one class each.

    Attributes:
        ignore_index: The label that stands for no class, for data that have one.
    """

    ignore_index: int | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, sampler: str = SHUFFLE) -> None:
        super().__init__()
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        self.batch_size, self.num_workers, self.sampler = batch_size, num_workers, sampler
        self.splits: dict[str, Dataset[Any]] = {}

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""

    @abstractmethod
    def load(self) -> dict[str, Dataset[Any]]:
        """Read, or make, the data sets by split, after checking all there is to check about them."""

    def size(self) -> Size | None:
        """Height and width of the images, where all have the same."""
        return None

    def setup(self, stage: str) -> None:
        """Load the splits, once."""
        self.splits = self.splits or self.load()

    def train_dataloader(self) -> DataLoader[Any]:
        """Samples of the train split, drawn at random.

        A last batch of a single sample is left out: batch statistics of one value are not defined.
        """
        return self._loader(TRAIN)

    def val_dataloader(self) -> DataLoader[Any]:
        """Samples of the val split, in order."""
        return self._loader(VAL)

    def test_dataloader(self) -> DataLoader[Any]:
        """Samples of the test split, in order."""
        return self._loader(TEST)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Samples of the test split, or of the val split where there is no test split."""
        return self._loader(TEST if TEST in self.splits else VAL)

    def class_counts(self) -> Tensor:
        """How often each class occurs in the train split, (classes,): in samples, or in pixels of their masks."""
        counts = torch.zeros(len(self.class_names), dtype=torch.long)
        for target in self.targets(TRAIN):
            counted = target if self.ignore_index is None else target[target != self.ignore_index]
            counts += torch.bincount(counted, minlength=len(counts))
        return counts

    def targets(self, split: str) -> Iterator[Tensor]:
        """The targets of a split, one sample after the other, flattened."""
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
            **(self._drawn() if split == TRAIN else {}),
        )

    def _drawn(self) -> dict[str, Any]:
        size = len(cast(Any, self.splits[TRAIN]))
        drop = {"drop_last": size > self.batch_size and size % self.batch_size == 1}
        if self.sampler == SHUFFLE:
            return {"shuffle": True, **drop}
        labels = list(self.targets(TRAIN))
        if any(len(label) != 1 for label in labels):
            raise ConfigError("sampler is 'balanced', which needs one class a sample; masks have many.")
        every = torch.cat(labels)
        weights = 1 / torch.bincount(every).clamp(min=1)
        return {"sampler": WeightedRandomSampler(weights[every].tolist(), size), **drop}
