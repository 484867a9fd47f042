"""Class probabilities of one image of any size: whole, or by sliding window, and averaged with its mirror image."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional

from lora_plugins import ConfigError
from lora_plugins.errors import sentence
from lora_plugins.tasks.data import INTERPOLATIONS, Size
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.segmentation import SemanticSegmentationTask
from lora_plugins.tasks.training import VisionTask, is_of_sizes

WINDOWS_PER_BATCH = 4

OVERLAP = 0.25
"""Share of a window that overlaps with the next one, by default."""


def label_probabilities(task: VisionTask, image: Tensor, *, flips: bool = False) -> Tensor:
    """The probability of each class, (classes,).

    The image (channels, H, W), 8-bit or in [0, 1], is resized to the size that the task, in eval mode, was trained
    with; with `flips`, its mirror image counts as much.
    """
    return _probabilities(task, resized(image, task.image_size, task.interpolation)[None], flips)[0]


def mask_probabilities(
    task: SemanticSegmentationTask,
    image: Tensor,
    *,
    window: Size | None = None,
    overlap: float = OVERLAP,
    flips: bool = False,
) -> Tensor:
    """The probability of each class at each pixel, (classes, H, W).

    Args:
        task: The task, in eval mode.
        image: (channels, H, W), 8-bit or in [0, 1], of any size.
        window: Height and width of a window that slides over the image at its own resolution; overlapping windows are
            averaged. By default the whole image is resized to the size that the task was trained with.
        overlap: Share of a window that overlaps with the next one.
        flips: Whether to average over the image and its mirror image.

    Raises:
        ConfigError: For an overlap or a window out of range, or a window that the network does not take.
    """
    _check_window(window, overlap)
    if window is not None:
        return _sliding(task, image, window, overlap, flips)
    return _enlarged(label_probabilities(task, image, flips=flips), image.shape[-2:])


def mask_labels(
    task: SemanticSegmentationTask,
    image: Tensor,
    *,
    window: Size | None = None,
    overlap: float = OVERLAP,
    flips: bool = False,
) -> Tensor:
    """The most probable class at each pixel, (H, W), 8-bit; probabilities of a large image would fill the memory.

    The arguments are those of `mask_probabilities`; the task has at most 256 classes.

    Raises:
        ConfigError: As `mask_probabilities` does.
    """
    _check_window(window, overlap)
    if window is not None:
        return _first_of_the_largest(_sliding(task, image, window, overlap, flips))
    return most_probable(label_probabilities(task, image, flips=flips), image.shape[-2:])


def most_probable(probabilities: Tensor, size: Sequence[int]) -> Tensor:
    """The most probable of at most 256 classes (classes, h, w) at each pixel of a larger image, (H, W), 8-bit."""
    return _first_of_the_largest(_enlarged(each[None], size)[0] for each in probabilities)


def _first_of_the_largest(planes: Iterable[Tensor]) -> Tensor:
    """The argmax over planes (H, W), of which one is held at a time; the first is written into."""
    rest = iter(planes)
    largest = next(rest)
    labels = torch.zeros_like(largest, dtype=torch.uint8)
    for index, plane in enumerate(rest, 1):
        labels.masked_fill_(plane > largest, index)
        torch.maximum(largest, plane, out=largest)
    return labels


def _enlarged(probabilities: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(probabilities[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def _check_window(window: Size | None, overlap: float) -> None:
    if window is not None and min(window) < 1:
        raise ConfigError(f"window is {window[0]}x{window[1]}; both are at least 1.")
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap is {overlap}; it is a share of the window, from 0 to below 1.")


def _sliding(task: SemanticSegmentationTask, image: Tensor, window: Size, overlap: float, flips: bool) -> Tensor:
    """The probabilities by windows, (classes, H, W)."""
    height, width = image.shape[-2:]
    missing = (0, max(0, window[1] - width), 0, max(0, window[0] - height))
    # An image that is smaller than a window is padded with its edge pixels.
    padded = pad(_unit(image)[None], missing, mode="replicate")[0] if any(missing) else image
    total = torch.zeros(task.model_config.num_classes, *padded.shape[-2:], device="cpu")  # as probabilities are
    count = torch.zeros(padded.shape[-2:], device="cpu")
    windows = list(_windows(padded.shape[-2], padded.shape[-1], window, overlap))
    for start in range(0, len(windows), WINDOWS_PER_BATCH):
        batch = windows[start : start + WINDOWS_PER_BATCH]
        images = torch.stack([_unit(padded[:, rows, columns]) for rows, columns in batch])
        results = _of_windows(task, images, flips)
        for (rows, columns), probabilities in zip(batch, results, strict=True):
            total[:, rows, columns] += probabilities
            count[rows, columns] += 1
    return total.div_(count)[:, :height, :width]


def _of_windows(task: VisionTask, windows: Tensor, flips: bool) -> Tensor:
    try:
        return _probabilities(task, windows, flips)
    except Exception as error:
        if not is_of_sizes(error):
            raise
        height, width = windows.shape[-2:]
        raise ConfigError(
            f"{task.model_config.name} takes no window of {height}x{width}: {sentence(error)} Choose another `window` "
            "(--window), or none."
        ) from error


@torch.inference_mode()
def _probabilities(task: VisionTask, images: Tensor, flips: bool) -> Tensor:
    images = images.to(task.device)
    probabilities: Tensor = task(images).float().softmax(1)
    if flips:
        mirrored = task(images.flip(-1)).float().softmax(1)
        probabilities = (probabilities + (mirrored.flip(-1) if mirrored.ndim == 4 else mirrored)) / 2
    if probabilities.isnan().any():
        raise WeightsError(
            "The model answers with NaN: weights are NaN or overflow, as after a training that diverged. Train it "
            "again with a smaller lr, or take an earlier checkpoint of its run."
        )
    return probabilities.cpu()


def resized(image: Tensor, size: Sequence[int] | None, interpolation: str) -> Tensor:
    """Resizes an image (channels, H, W), 8-bit or in [0, 1], as data of a task were, in 8 bits, to one in [0, 1]."""
    if size is None:
        return _unit(image)
    stored = functional.to_dtype(image, torch.uint8, scale=True)
    new = functional.resize(stored, list(size), interpolation=INTERPOLATIONS[interpolation], antialias=True)
    unit: Tensor = functional.to_dtype(new, torch.float32 if image.dtype == torch.uint8 else image.dtype, scale=True)
    return unit


def _unit(image: Tensor) -> Tensor:
    """An image in [0, 1]."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _windows(height: int, width: int, window: Size, overlap: float) -> Iterator[tuple[slice, slice]]:
    for top in _offsets(height, window[0], overlap):
        for left in _offsets(width, window[1], overlap):
            yield slice(top, top + window[0]), slice(left, left + window[1])


def _offsets(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start: at even steps, and the last one so that it ends at the edge."""
    step = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]
