"""Data sets of samples: held in memory, or read when they are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors


class TensorSamples(Dataset[dict[str, Any]]):
    """Samples in memory: 8-bit images (N, channels, H, W), and class indices (N,) or masks (N, H, W) of them."""

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


@dataclass(frozen=True)
class Item:
    """A sample that is not read yet.

    Attributes:
        image: Where its image is: a path, or a split and a row number.
        target: A class index, or where its mask is.
        name: Its name in error messages.
        key: Its name within the data, by which splits are made: the same wherever the data are.
    """

    image: Any
    target: Any
    name: str
    key: str


class LazySamples(Dataset[dict[str, Any]]):
    """Samples that are read when they are needed.

    Args:
        items: The samples.
        read: Reads one: its image, and its class index or mask (H, W).
        transform: Transforms an image and its mask together; the image becomes (channels, H, W) in [0, 1].
    """

    def __init__(self, items: Sequence[Item], read: Callable[[Item], tuple[Image.Image, Any]], transform: Any) -> None:
        self.items, self.read, self.transform = items, read, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        image, target = self.read(item)
        if isinstance(target, np.ndarray):
            image, mask = self.transform(image, tv_tensors.Mask(torch.from_numpy(target)))
            target = mask if mask.is_floating_point() else mask.long()  # fractions are no classes
        else:
            image = self.transform(image)
        return {"image": image, "target": target, "name": item.name}
