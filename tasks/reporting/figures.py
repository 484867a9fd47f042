"""Figures of a fit: predictions, the confusion matrix, curves."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lora_plugins.tasks.segmentation import class_colors, colorize, overlay
from lora_plugins.tasks.training import VisionTask

INCHES = 2.0
MASK_TITLES = ("image", "true mask", "predicted mask", "overlay")
KEY_COLUMNS, MOST_KEYS = 5, 25
"""The key of a figure of masks names the classes that occur, up to as many as fit under it."""

MOST_TICKS = 40


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, without pyplot, which has global state and picks a GUI backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def labels_figure(task: VisionTask, images: Tensor, labels: Tensor, predicted: Tensor) -> Any:
    """A figure of images (N, channels, H, W) in a row, each with its true and predicted class."""
    names = task.class_labels
    figure = new_figure(INCHES * len(images), INCHES + 0.6)
    axes = figure.subplots(1, len(images), squeeze=False)
    for axis, image, true, guess in zip(axes[0], images, labels.tolist(), predicted.tolist(), strict=True):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy())
        label = names[true] if 0 <= true < len(names) else "(ignored)"
        axis.set_title(f"{label}\n→ {names[guess]}", fontsize="small", color="black" if guess == true else "firebrick")
        axis.set_axis_off()
    return figure


def masks_figure(task: VisionTask, images: Tensor, masks: Tensor, predicted: Tensor) -> Any:
    """A figure with a row for each image (N, channels, H, W): image, true mask, predicted mask, overlay."""
    from matplotlib.patches import Patch

    classes, ignored = task.model_config.num_classes, task.ignore_index
    names = task.class_labels
    colors = class_colors(classes)
    figure = new_figure(INCHES * len(MASK_TITLES), INCHES * len(images) + 0.6)
    axes = figure.subplots(len(images), len(MASK_TITLES), squeeze=False)
    for row, image, true, guess in zip(axes, images, masks.numpy(), predicted.numpy(), strict=True):
        pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        true_mask, predicted_mask = (colorize(mask, colors, ignored) for mask in (true, guess))
        shown = (pixels, true_mask, predicted_mask, overlay(pixels, guess, colors, ignored))
        for axis, panel in zip(row, shown, strict=True):
            axis.imshow(panel)
            axis.set_axis_off()
    for axis, title in zip(axes[0], MASK_TITLES, strict=True):
        axis.set_title(title)
    occurring = [i for i in range(classes) if bool(((masks == i) | (predicted == i)).any())][:MOST_KEYS]
    patches = [Patch(color=colors[i] / 255, label=names[i]) for i in occurring]
    figure.legend(handles=patches, loc="outside lower center", ncols=KEY_COLUMNS, fontsize="small")
    return figure


def examples_figure(task: VisionTask, images: Tensor, targets: Tensor, predicted: Tensor) -> Any:
    """A figure of predicted labels or masks, as the targets are."""
    draw = masks_figure if targets.ndim > 1 else labels_figure
    return draw(task, images, targets, predicted)


def confusion_figure(confusion: Tensor, names: Sequence[str]) -> Any:
    """A figure of a confusion matrix (true, predicted), each row normalized."""
    counts = confusion.float()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(10.0, 2.5 + 0.3 * len(names))
    figure = new_figure(side + 0.8, side)
    axis = figure.subplots()
    drawn = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(names) <= MOST_TICKS:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        axis.set_yticks(range(len(names)), names, fontsize="small")
    figure.colorbar(drawn, shrink=0.8)
    return figure


def curves_figure(history: Mapping[str, Sequence[tuple[int, float]]], name: str) -> Any:
    """A figure of one metric over the epochs, for train and val.

    Args:
        history: Epoch and value by full name, such as `val/loss`.
        name: The metric, without its split.
    """
    figure = new_figure(4.5, 3.0)
    axis = figure.subplots()
    for split in ("train", "val"):
        points = history.get(f"{split}/{name}")
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=split)
    axis.set_title(name)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def as_data_url(figure: Any) -> str:
    """A figure as a PNG in a `data:` URL."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def first_val_loader(trainer: Trainer) -> DataLoader[Any]:
    """The first loader of the val split."""
    loaders = trainer.val_dataloaders
    return cast("DataLoader[Any]", loaders[0] if isinstance(loaders, list) else loaders)


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices below `total`."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()]


@torch.inference_mode()
def eval_logits(task: VisionTask, images: Tensor) -> Tensor:
    """Logits of images in eval mode; the mode of every module is restored."""
    training = {module: module.training for module in task.modules()}
    task.eval()
    try:
        logits: Tensor = task(images.to(task.device)).float().cpu()
        return logits
    finally:
        for module, mode in training.items():
            module.training = mode
