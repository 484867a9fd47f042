"""Images in one folder a class: `{train,val}/CLASS/NAME.jpg`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lora_plugins.tasks.data import TEST, TRAIN, VAL, VisionDataModule
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import image_files, read_image, subfolders
from lora_plugins.tasks.transforms import Size, image_transform


class LabelledFiles(Dataset[dict[str, Any]]):
    """Image files with a class index each.

    Args:
        samples: The path and the class index of each image.
        transform: From a PIL image to a tensor (channels, H, W) in [0, 1].
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Any) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        return {"image": self.transform(read_image(path)), "target": label, "name": str(path)}


class ImageFolderDataModule(VisionDataModule):
    """Images on disk, sorted into folders by class: `root/train/CLASS/...`, `root/val/CLASS/...`, perhaps `root/test`.

    The classes are the folders of `train`, in alphabetical order.

    Args:
        root: The folder that holds `train` and `val`.
        image_size: Height and width to which all images are brought.
        augmentation: What is done to training images: `none`, `flip` or `crop_flip`.
        batch_size: Images a batch.
        num_workers: Processes that load images; 0 loads in the training process.
    """

    def __init__(
        self,
        root: str,
        *,
        image_size: Size = (224, 224),
        augmentation: str = "flip",
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root = Path(root)
        self.transforms = {TRAIN: image_transform(image_size, augmentation)}
        self.plain = image_transform(image_size)
        self._classes: list[str] = []

    @property
    def class_names(self) -> list[str]:
        """The folders of the train split."""
        self._classes = self._classes or subfolders(self.root / TRAIN)
        return self._classes

    def load(self) -> dict[str, Dataset[Any]]:
        """Find the images of all splits.

        Raises:
            DataError: With every folder that is missing, empty or unknown to the train split.
        """
        splits = [TRAIN, VAL, *([TEST] if (self.root / TEST).is_dir() else [])]
        return {split: LabelledFiles(self._samples(split), self.transforms.get(split, self.plain)) for split in splits}

    def _samples(self, split: str) -> list[tuple[Path, int]]:
        folder = self.root / split
        found = {name: image_files(folder / name) for name in subfolders(folder)}
        problems = [
            *(f"{folder / name} holds no image" for name, paths in found.items() if not paths),
            *(f"{folder / name} is no class of {self.root / TRAIN}" for name in found if name not in self.class_names),
            *(f"{folder / name} is missing" for name in self.class_names if split == TRAIN and name not in found),
        ]
        if problems:
            raise DataError(f"The image folders under {folder} cannot be used:\n{listed(problems)}")
        return [(path, self.class_names.index(name)) for name, paths in found.items() for path in paths]
