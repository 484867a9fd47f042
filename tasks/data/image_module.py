"""Data modules over pictures: finding them, checking them in one pass, splitting them, and what is done to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lora_plugins import ConfigError
from lora_plugins.errors import near
from lora_plugins.tasks.data.image_io import why_unreadable
from lora_plugins.tasks.data.splitting import check_shares, split_off
from lora_plugins.tasks.data.transforms import Size, image_transform
from lora_plugins.tasks.data.vision_module import TEST, TRAIN, VAL, VisionDataModule
from lora_plugins.tasks.errors import DataError, listed

ERROR, SKIP = "error", "skip"
PROBLEMS = (ERROR, SKIP)


@dataclass(frozen=True)
class Item:
    """One sample, not read yet.

    Attributes:
        image: Where its image is: a path, or the number of a row.
        target: A class index, or where its mask is.
        name: What it is called in errors; unique.
    """

    image: Any
    target: Any
    name: str


class Samples(Dataset[dict[str, Any]]):
    """Samples that are read when they are needed.

    Args:
        items: The samples.
        read: Reads one: its image, and its class index or mask (H, W).
        transform: Moves an image and its mask together; the image becomes (channels, H, W) in [0, 1].
    """

    def __init__(self, items: Sequence[Item], read: Callable[[Item], tuple[Image.Image, Any]], transform: Any) -> None:
        self.items, self.read, self.transform = items, read, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        image, target = self.read(item)
        if isinstance(target, np.ndarray):
            image, target = self.transform(image, tv_tensors.Mask(torch.from_numpy(target)))
        else:
            image = self.transform(image)
        return {"image": image, "target": target, "name": item.name}


class PictureDataModule(VisionDataModule):
    """A data module over pictures and their labels or masks.

    Args:
        image_size: Height and width to which all images (and masks) are brought; by default what the model that is
            trained says.
        interpolation: How images are resized: `bilinear`, `bicubic`, `nearest`; by default what the model says.
        augmentation: What is done to training images, a name in `lora_plugins.tasks.data.AUGMENTATIONS`.
        val_share: Share of the train split that becomes the val split, where the data come without one.
        test_share: Likewise for the test split.
        split_seed: Which of the many possible splits.
        check_files: Whether every picture is read once before training, to list all that cannot be used.
        on_problem: What happens to samples that cannot be used: `error` stops with a list of them, `skip` leaves them
            out with a warning that lists them.
        batch_size: Samples a batch.
        num_workers: Processes that load images; 0 loads in the training process.
        sampler: `shuffle`, or `balanced` to draw each class equally often (classification).
    """

    has_masks = False

    def __init__(
        self,
        *,
        image_size: Size | None = None,
        interpolation: str | None = None,
        augmentation: str = "flip",
        val_share: float = 0.0,
        test_share: float = 0.0,
        split_seed: int = 0,
        check_files: bool = True,
        on_problem: str = ERROR,
        batch_size: int = 32,
        num_workers: int = 0,
        sampler: str = "shuffle",
    ) -> None:
        super().__init__(batch_size, num_workers, sampler)
        check_shares(val_share, test_share)
        if on_problem not in PROBLEMS:
            raise ConfigError(f"on_problem is {on_problem!r}. {near(on_problem, PROBLEMS)}")
        self.image_size, self.interpolation, self.augmentation = image_size, interpolation, augmentation
        self.shares, self.split_seed = {VAL: val_share, TEST: test_share}, split_seed
        self.check_files, self.on_problem = check_files, on_problem
        self._transform((8, 8), augmentation)  # an unknown name is an error now, not after an hour of checking files

    @abstractmethod
    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The samples by split, and what is wrong with those that were left out."""

    @abstractmethod
    def read(self, item: Item) -> tuple[Image.Image, Any]:
        """Read a sample: its image, and its class index or mask (H, W).

        Raises:
            DataError: Where it cannot be used.
        """

    def targets(self, split: str) -> Iterator[Tensor]:
        """The targets of a split, one sample after the other, flattened; masks are read as they are on disk."""
        for item in cast(Samples, self.splits[split]).items:
            known = isinstance(item.target, int)
            yield torch.as_tensor(item.target if known else self.read(item)[1]).reshape(-1)

    def stratum(self, item: Item) -> Hashable:
        """What splits are divided evenly by: the class, where there is one an image."""
        return item.target if isinstance(item.target, int) else 0

    def load(self) -> dict[str, Dataset[Any]]:
        """Find the samples, check them, and split them.

        Raises:
            DataError: With a list of what cannot be used, or where nothing is left.
        """
        items, problems = self.find()
        if self.check_files:
            items, more = self._checked(items)
            problems = [*problems, *more]
        if problems:
            self._report(problems)
        items = split_off(items, self.shares, seed=self.split_seed, name=lambda i: i.name, stratum=self.stratum)
        for split in (TRAIN, VAL):
            if not items.get(split):
                raise DataError(f"There is nothing in the {split} split. Add samples, or set `{VAL}_share`.")
        plain, augmented = self.plain_transform(), self._transform(self.size(), self.augmentation)
        transforms = {split: augmented if split == TRAIN else plain for split in items}
        return {split: Samples(found, self.read, transforms[split]) for split, found in items.items()}

    def size(self) -> Size:
        """Height and width of the images.

        Raises:
            ConfigError: Where neither the arguments nor the model say.
        """
        size = self.image_size or getattr(self._model_says(), "image_size", None)
        if size is None:
            raise ConfigError(f"Set `image_size` of {type(self).__name__}: the model does not say what it should be.")
        return int(size[0]), int(size[1])

    def plain_transform(self) -> Any:
        """What is done to images outside training."""
        return self._transform(self.size(), "none")

    def _transform(self, size: Size, augmentation: str) -> Any:
        way = self.interpolation or getattr(self._model_says(), "interpolation", "bilinear")
        return image_transform(
            size, augmentation, interpolation=way, masks=self.has_masks, ignore_index=self.ignore_index
        )

    def _model_says(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    def _checked(self, items: dict[str, list[Item]]) -> tuple[dict[str, list[Item]], list[str]]:
        every = [item for found in items.values() for item in found]
        wrong = {id(item): why for item, why in zip(every, why_unreadable(every, self.read), strict=True) if why}
        good = {split: [item for item in found if id(item) not in wrong] for split, found in items.items()}
        return good, list(wrong.values())

    def _report(self, problems: Sequence[str]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        if self.on_problem == ERROR:
            raise DataError(
                f"The data cannot be used ({count}):\n{listed(problems)}\nWith on_problem: skip, such samples are left "
                "out."
            )
        rank_zero_warn(f"Samples are left out ({count}):\n{listed(problems)}")
