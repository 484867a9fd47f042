"""What a task says of one image of any size: whole, or window by window, and with its mirror image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional

from lora_plugins import ConfigError
from lora_plugins.tasks.data import INTERPOLATIONS, Size
from lora_plugins.tasks.segmentation import SemanticSegmentationTask
from lora_plugins.tasks.training import VisionTask

BATCH = 4


def label_probabilities(task: VisionTask, image: Tensor, *, flips: bool = False) -> Tensor:
    """The probability of each class, (classes,).

    Args:
        task: The task, in evaluation mode.
        image: (channels, H, W) in [0, 1], of any size; it is brought to the size that the task was trained with.
        flips: Whether the mean over the image and its mirror image is taken.
    """
    found = _averaged(task, _resized(task, image)[None], flips)
    return found[0]


def mask_probabilities(
    task: SemanticSegmentationTask,
    image: Tensor,
    *,
    window: Size | None = None,
    overlap: float = 0.25,
    flips: bool = False,
) -> Tensor:
    """The probability of each class at each pixel, (classes, H, W).

    Args:
        task: The task, in evaluation mode.
        image: (channels, H, W) in [0, 1], of any size.
        window: Height and width of windows that are moved over the image at its own resolution; where they overlap the
            mean is taken. By default the whole image is brought to the size that the task was trained with.
        overlap: Share of a window that the next one covers again.
        flips: Whether the mean over the image and its mirror image is taken.

    Raises:
        ConfigError: For an overlap that is no share, or a window of nothing.
    """
    if window is not None and min(window) < 1:
        raise ConfigError(f"window is {window[0]}x{window[1]}; both are at least 1.")
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap is {overlap}; it is a share of the window, from 0 to below 1.")
    height, width = image.shape[-2:]
    if window is None:
        found = _averaged(task, _resized(task, image)[None], flips)
        return interpolate(found, size=(height, width), mode="bilinear", align_corners=False)[0]
    # Replicated pixels fill up an image that is smaller than a window.
    filled = pad(image[None], (0, max(0, window[1] - width), 0, max(0, window[0] - height)), mode="replicate")[0]
    total = filled.new_zeros(task.model_config.num_classes, *filled.shape[-2:])
    count = filled.new_zeros(filled.shape[-2:])
    places = list(_places(filled.shape[-2], filled.shape[-1], window, overlap))
    for start in range(0, len(places), BATCH):
        some = places[start : start + BATCH]
        found = _averaged(task, torch.stack([filled[:, rows, columns] for rows, columns in some]), flips)
        for (rows, columns), probabilities in zip(some, found, strict=True):
            total[:, rows, columns] += probabilities
            count[rows, columns] += 1
    return (total / count)[:, :height, :width]


@torch.inference_mode()
def _averaged(task: VisionTask, images: Tensor, flips: bool) -> Tensor:
    images = images.to(task.device)
    found: Tensor = task(images).float().softmax(1)
    if flips:
        mirrored = task(images.flip(-1)).float().softmax(1)
        found = (found + (mirrored.flip(-1) if mirrored.ndim == 4 else mirrored)) / 2
    return found.cpu()


def _resized(task: VisionTask, image: Tensor) -> Tensor:
    if task.image_size is None:
        return image
    way = INTERPOLATIONS[task.interpolation]
    return functional.resize(image, list(task.image_size), interpolation=way, antialias=True).clamp(0, 1)


def _places(height: int, width: int, window: Size, overlap: float) -> Iterator[tuple[slice, slice]]:
    for top in _starts(height, window[0], overlap):
        for left in _starts(width, window[1], overlap):
            yield slice(top, top + window[0]), slice(left, left + window[1])


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start: at even steps, and the last one at the edge."""
    step = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]
