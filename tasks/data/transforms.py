"""From a picture on disk to what a network sees, and its mask along with it (torchvision transforms, version 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unknown

Size = tuple[int, int]

INTERPOLATIONS: Mapping[str, InterpolationMode] = MappingProxyType(
    {
        "bilinear": InterpolationMode.BILINEAR,
        "bicubic": InterpolationMode.BICUBIC,
        "nearest": InterpolationMode.NEAREST_EXACT,
        # Tensors know no Lanczos; bicubic is its nearest relative.
        "lanczos": InterpolationMode.BICUBIC,
        "random": InterpolationMode.BILINEAR,  # timm's word for either of two
    }
)


@dataclass(frozen=True)
class Shape:
    """What a policy needs to know: the size, how to interpolate, and what fills the corners of a turned mask."""

    size: Size
    way: InterpolationMode
    fill: Mapping[Any, float]

    def resize(self) -> Any:
        """To the size, without keeping the proportions."""
        return v2.Resize(self.size, interpolation=self.way, antialias=True)

    def crop(self, least: float) -> Any:
        """A random part of at least this share of the area, enlarged to the size."""
        return v2.RandomResizedCrop(self.size, scale=(least, 1.0), interpolation=self.way, antialias=True)

    def turn(self, degrees: float) -> Any:
        """A small random turn."""
        return v2.RandomRotation(degrees, interpolation=InterpolationMode.BILINEAR, fill=dict(self.fill))


def _colors() -> Any:
    return v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)


AUGMENTATIONS: Mapping[str, Callable[[Shape], list[Any]]] = MappingProxyType(
    {
        "none": lambda to: [to.resize()],
        "flip": lambda to: [to.resize(), v2.RandomHorizontalFlip()],
        "crop_flip": lambda to: [to.crop(0.5), v2.RandomHorizontalFlip()],
        "crop_flip_color": lambda to: [to.crop(0.5), v2.RandomHorizontalFlip(), _colors()],
        "strong": lambda to: [to.crop(0.3), v2.RandomHorizontalFlip(), to.turn(10), _colors()],
        "trivial": lambda to: [to.crop(0.5), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()],
    }
)
"""`strong` turns by up to ten degrees and changes colors; `trivial` is TrivialAugment (arXiv 2103.10158)."""

IMAGES_ONLY = frozenset({"trivial"})


def image_transform(
    size: Size,
    augmentation: str = "none",
    *,
    interpolation: str = "bilinear",
    masks: bool = False,
    ignore_index: int | None = None,
) -> v2.Compose:
    """A transform to float images in [0, 1] of one size; a mask given with an image moves with it, unblended.

    Args:
        size: Height and width.
        augmentation: A name in `AUGMENTATIONS`.
        interpolation: A name in `INTERPOLATIONS`.
        masks: Whether masks come with the images.
        ignore_index: What fills a mask where a turned image has no pixel; by default 255.

    Raises:
        ConfigError: For a name that is not there, or a policy that does not know what to do to a mask.
    """
    if augmentation not in AUGMENTATIONS:
        raise unknown("augmentation", augmentation, AUGMENTATIONS)
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    if masks and augmentation in IMAGES_ONLY:
        usable = ", ".join(name for name in AUGMENTATIONS if name not in IMAGES_ONLY)
        raise ConfigError(f"The augmentation {augmentation!r} cannot move masks with their images; {usable} can.")
    fill = {tv_tensors.Image: 0.0, tv_tensors.Mask: 255 if ignore_index is None else ignore_index}
    shape = Shape(size, INTERPOLATIONS[interpolation], fill)
    to_unit = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([v2.ToImage(), *AUGMENTATIONS[augmentation](shape), to_unit, v2.ToPureTensor()])
