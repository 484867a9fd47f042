"""Image transforms: resize, augment, and move a mask along with its image (torchvision transforms, version 2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unknown

Size = tuple[int, int]

INTERPOLATIONS: Mapping[str, InterpolationMode] = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST_EXACT,
    "lanczos": InterpolationMode.BICUBIC,  # the nearest that tensors have
    "random": InterpolationMode.BILINEAR,  # timm's name for a random choice of two
}


class _Resize(v2.Resize):  # type: ignore[misc]  # torchvision has no types
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return _at_centers(functional.resize, inpt, size=self.size)
        return super().transform(inpt, params)


class _RandomResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]  # likewise
    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return _at_centers(functional.resized_crop, inpt, **params, size=self.size)
        return super().transform(inpt, params)


def _at_centers(resize: Callable[..., Tensor], mask: tv_tensors.Mask, **params: Any) -> Tensor:
    """Resizes a mask to the labels at the centers of pixels, where images are sampled; torchvision takes corners."""
    labels = resize(mask.as_subclass(Tensor)[None], **params, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    wrapped: Tensor = tv_tensors.wrap(labels, like=mask)
    return wrapped


@dataclass(frozen=True)
class Resizing:
    """What an augmentation policy needs to know: the size, the interpolation, and the fill of rotated corners."""

    size: Size
    interpolation: InterpolationMode
    fill: Mapping[Any, float]

    def resize(self) -> Any:
        """Resizes without keeping the aspect ratio."""
        return _Resize(self.size, interpolation=self.interpolation, antialias=True)

    def random_crop(self, min_area: float) -> Any:
        """Crops at random, at least this share of the area, and resizes the crop."""
        return _RandomResizedCrop(self.size, scale=(min_area, 1.0), interpolation=self.interpolation, antialias=True)

    def rotate(self, degrees: float) -> Any:
        """Rotates by a random angle of at most so many degrees."""
        return v2.RandomRotation(degrees, interpolation=InterpolationMode.BILINEAR, fill=dict(self.fill))


def _color_jitter() -> Any:
    return v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)


AUGMENTATIONS: Mapping[str, Callable[[Resizing], list[Any]]] = {
    "none": lambda to: [to.resize()],
    "flip": lambda to: [to.resize(), v2.RandomHorizontalFlip()],
    "crop_flip": lambda to: [to.random_crop(0.5), v2.RandomHorizontalFlip()],
    "crop_flip_color": lambda to: [to.random_crop(0.5), v2.RandomHorizontalFlip(), _color_jitter()],
    "strong": lambda to: [to.random_crop(0.3), v2.RandomHorizontalFlip(), to.rotate(10), _color_jitter()],
    "trivial": lambda to: [to.random_crop(0.5), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()],
}
"""`strong` rotates by up to ten degrees and jitters colors; `trivial` is TrivialAugment (arXiv 2103.10158)."""

IMAGES_ONLY = frozenset({"trivial"})


def image_transform(
    size: Size,
    augmentation: str = "none",
    *,
    interpolation: str = "bilinear",
    masks: bool = False,
    ignore_index: int | None = None,
) -> v2.Compose:
    """A transform to float images in [0, 1] of one size; masks move with their images, without blending labels.

    `ignore_index` fills a mask where a rotated image has no pixel; by default 255.

    Raises:
        ConfigError: For an unknown name, or a policy that cannot transform masks.
    """
    if augmentation not in AUGMENTATIONS:
        raise unknown("augmentation", augmentation, AUGMENTATIONS)
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    if masks and augmentation in IMAGES_ONLY:
        usable = ", ".join(name for name in AUGMENTATIONS if name not in IMAGES_ONLY)
        raise ConfigError(f"The augmentation {augmentation!r} cannot move masks with their images; {usable} can.")
    fill = {tv_tensors.Image: 0.0, tv_tensors.Mask: 255 if ignore_index is None else ignore_index}
    resizing = Resizing(size, INTERPOLATIONS[interpolation], fill)
    to_unit = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([v2.ToImage(), *AUGMENTATIONS[augmentation](resizing), to_unit, v2.ToPureTensor()])
