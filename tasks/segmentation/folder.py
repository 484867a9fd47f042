"""Images with a mask each: `images/{train,val}/NAME.jpg` and `masks/{train,val}/NAME.png`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lora_plugins.tasks.data import TEST, TRAIN, VAL, VisionDataModule
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import (
    MASK_SUFFIXES,
    existing_folder,
    image_files,
    picture_size,
    read_image,
    read_index_mask,
)
from lora_plugins.tasks.transforms import Size, image_transform

IMAGES, MASKS = "images", "masks"


class MaskedFiles(Dataset[dict[str, Any]]):
    """Image files with a mask file each.

    Args:
        pairs: The path of each image and of its mask.
        transform: Moves an image and its mask together; the image becomes (channels, H, W) in [0, 1].
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], transform: Any) -> None:
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, mask_path = self.pairs[index]
        mask = tv_tensors.Mask(torch.from_numpy(read_index_mask(mask_path).copy()).long())
        image, mask = self.transform(read_image(image_path), mask)
        return {"image": image, "target": mask, "name": str(mask_path)}


class MaskFolderDataModule(VisionDataModule):
    """Images and masks on disk, paired by name: `root/images/train/a.jpg` with `root/masks/train/a.png`.

    Splits are `train` and `val`, and `test` where there is such a folder. A mask is an 8-bit PNG that holds one class
    index a pixel.

    Args:
        root: The folder that holds `images` and `masks`.
        classes: Names of the classes, in the order of their indices in the masks.
        image_size: Height and width to which images and masks are brought; metrics are computed at this size.
        ignore_index: A value of the masks that stands for no class; the task must be given the same.
        augmentation: What is done to training images: `none`, `flip` or `crop_flip`.
        check_masks: Read every mask once before training, to list all that hold something else than a class.
        batch_size: Images a batch.
        num_workers: Processes that load images; 0 loads in the training process.
    """

    def __init__(
        self,
        root: str,
        *,
        classes: Sequence[str],
        image_size: Size = (512, 512),
        ignore_index: int = 255,
        augmentation: str = "flip",
        check_masks: bool = True,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root, self.classes, self.ignore_index = Path(root), list(classes), ignore_index
        self.check_masks = check_masks
        self.transforms = {TRAIN: image_transform(image_size, augmentation)}
        self.plain = image_transform(image_size)

    @property
    def class_names(self) -> list[str]:
        """The names that were given."""
        return self.classes

    def load(self) -> dict[str, Dataset[Any]]:
        """Pair the images and masks of all splits, and check them.

        Raises:
            DataError: With every image without a mask, mask without an image, pair of two sizes, and mask that holds
                something else than a class.
        """
        splits = [TRAIN, VAL, *([TEST] if (self.root / IMAGES / TEST).is_dir() else [])]
        return {split: MaskedFiles(self._pairs(split), self.transforms.get(split, self.plain)) for split in splits}

    def _pairs(self, split: str) -> list[tuple[Path, Path]]:
        existing_folder(self.root)
        folder = self.root / IMAGES / split
        images = _by_stem(image_files(folder))
        masks = _by_stem(image_files(self.root / MASKS / split, MASK_SUFFIXES))
        pairs = [(images[stem], masks[stem]) for stem in images if stem in masks]
        problems = [
            *([f"{folder} holds no image"] if not images else []),
            *(
                f"{path} has no mask {self.root / MASKS / split / stem}.png"
                for stem, path in images.items()
                if stem not in masks
            ),
            *(f"{path} has no image in {folder}" for stem, path in masks.items() if stem not in images),
            *(problem for pair in pairs for problem in self._wrong_with(*pair)),
        ]
        if problems:
            raise DataError(
                f"The {split} split of {self.root} cannot be used ({len(problems)} problems):\n{listed(problems)}"
            )
        return pairs

    def _wrong_with(self, image: Path, mask: Path) -> list[str]:
        try:
            sizes = picture_size(image), picture_size(mask)
            if sizes[0] != sizes[1]:
                return [f"{mask} is {_by(sizes[1])}, its image {image.name} is {_by(sizes[0])} (height x width)"]
            values = np.unique(read_index_mask(mask)) if self.check_masks else np.empty(0, dtype=np.uint8)
        except DataError as error:
            return [str(error)]
        wrong = [int(v) for v in values if v >= len(self.classes) and v != self.ignore_index]
        if not wrong:
            return []
        allowed = f"0 to {len(self.classes) - 1}, and {self.ignore_index} for what is ignored"
        return [f"{mask} holds {', '.join(map(str, wrong))}; allowed are {allowed}"]


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    count = Counter(path.stem for path in paths)
    twice = [path for path in paths if count[path.stem] > 1]
    if twice:
        raise DataError(f"Files of one name, so that their masks cannot be told:\n{listed([str(p) for p in twice])}")
    return {path.stem: path for path in paths}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
