"""From a picture on disk to what a network sees, and its mask along with it (torchvision transforms, version 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from lora_plugins.tasks.errors import unknown

Size = tuple[int, int]

AUGMENTATIONS: Mapping[str, Callable[[Size], list[Any]]] = MappingProxyType(
    {
        "none": lambda size: [v2.Resize(size, antialias=True)],
        "flip": lambda size: [v2.Resize(size, antialias=True), v2.RandomHorizontalFlip()],
        "crop_flip": lambda size: [
            v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ],
    }
)


def image_transform(size: Size, augmentation: str = "none") -> v2.Compose:
    """A transform to float images in [0, 1] of one size; a mask given with an image moves with it, unblended.

    Args:
        size: Height and width.
        augmentation: A name in `AUGMENTATIONS`.

    Raises:
        ConfigError: For a name that is not there.
    """
    if augmentation not in AUGMENTATIONS:
        raise unknown("augmentation", augmentation, AUGMENTATIONS)
    to_unit = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([v2.ToImage(), *AUGMENTATIONS[augmentation](size), to_unit, v2.ToPureTensor()])
