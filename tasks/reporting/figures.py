"""Figures that show how a fit goes: predictions, the confusion matrix, curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lora_plugins.tasks.segmentation import SemanticSegmentationTask, class_colors, colored, overlay

INCHES = 2.0
MASK_TITLES = ("image", "true mask", "predicted mask", "overlay")
KEY_COLUMNS, MOST_KEYS = 5, 25
"""The key of a figure of masks names the classes that occur, up to as many as fit under it."""

MOST_TICKS = 40


def blank(width: float, height: float) -> Any:
    """An empty figure of some inches, without pyplot, which keeps a global list and chooses a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def labels_figure(task: Any, images: Tensor, labels: Tensor, predicted: Tensor) -> Any:
    """A figure of images (N, channels, H, W) in a row, each with its true and its predicted class."""
    names = task.class_names or [str(i) for i in range(task.model_config.num_classes)]
    figure = blank(INCHES * len(images), INCHES + 0.6)
    axes = figure.subplots(1, len(images), squeeze=False)
    for axis, image, true, guess in zip(axes[0], images, labels.tolist(), predicted.tolist(), strict=True):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy())
        known = names[true] if 0 <= true < len(names) else "(ignored)"
        axis.set_title(f"{known}\n→ {names[guess]}", fontsize="small", color="black" if guess == true else "firebrick")
        axis.set_axis_off()
    return figure


def masks_figure(task: SemanticSegmentationTask, images: Tensor, masks: Tensor, predicted: Tensor) -> Any:
    """A figure with a row for each image (N, channels, H, W): itself, its true mask, the predicted one, the overlay."""
    from matplotlib.patches import Patch

    classes, ignored = task.model_config.num_classes, task.ignore_index
    names = task.class_names or [str(i) for i in range(classes)]
    colors = class_colors(classes)
    figure = blank(INCHES * len(MASK_TITLES), INCHES * len(images) + 0.6)
    axes = figure.subplots(len(images), len(MASK_TITLES), squeeze=False)
    for row, image, true, guess in zip(axes, images, masks.numpy(), predicted.numpy(), strict=True):
        pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        drawn = (colored(true, colors, ignored), colored(guess, colors, ignored))
        for axis, picture in zip(row, (pixels, *drawn, overlay(pixels, guess, colors, ignored)), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, title in zip(axes[0], MASK_TITLES, strict=True):
        axis.set_title(title)
    shown = [i for i in range(classes) if bool(((masks == i) | (predicted == i)).any())][:MOST_KEYS]
    patches = [Patch(color=colors[i] / 255, label=names[i]) for i in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=KEY_COLUMNS, fontsize="small")
    return figure


def examples_figure(task: Any, images: Tensor, targets: Tensor, predicted: Tensor) -> Any:
    """The figure of predictions that goes with the task: labels, or masks."""
    draw = masks_figure if targets.ndim > 1 else labels_figure
    return draw(task, images, targets, predicted)


def confusion_figure(confusion: Tensor, names: Sequence[str]) -> Any:
    """A figure of a confusion matrix (true, predicted), each row as shares of its class."""
    counts = confusion.float()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(10.0, 2.5 + 0.3 * len(names))
    figure = blank(side + 0.8, side)
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
    """A figure of one metric over the epochs, train and val in one picture.

    Args:
        history: Epoch and value by full name, such as `val/loss`.
        name: The metric, without its split.
    """
    figure = blank(4.5, 3.0)
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
    """A figure as a PNG that is part of a page."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def first_loader(trainer: Trainer) -> DataLoader[Any]:
    """The first loader of the val split."""
    loaders = trainer.val_dataloaders
    return cast("DataLoader[Any]", loaders[0] if isinstance(loaders, list) else loaders)


def spread(total: int, count: int) -> list[int]:
    """Some indices, evenly spread over all of them."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()]


@torch.inference_mode()
def predicted_logits(task: LightningModule, images: Tensor) -> Tensor:
    """Logits of images in evaluation mode; every module is put back into the mode it was in."""
    training = {module: module.training for module in task.modules()}
    task.eval()
    try:
        logits: Tensor = task(images.to(task.device)).float().cpu()
        return logits
    finally:
        for module, mode in training.items():
            module.training = mode
