"""Figures of a fit: predictions and the confusion matrix."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_plugins.tasks.reporting.val_loaders import samples_of, val_precision
from lora_plugins.tasks.segmentation import IGNORED, Pixels, class_colors, colorize, overlay
from lora_plugins.tasks.training import VisionTask, eval_mode
from lora_plugins.utils import replace_file

INCHES = 2.0
DPI = 200
"""Dots per inch of a figure in a file: enough for print."""

MASK_TITLES = ("image", "true mask", "predicted mask", "overlay")
KEY_COLUMNS, MOST_KEYS = 5, 25
"""The key of a figure of masks names the classes that occur, up to as many as fit under it."""

VOID = "void (not counted)"
MOST_TICKS, MOST_NUMBERS = 40, 20
RIGHT, WRONG = "black", "#D55E00"


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, without pyplot, which has global state and picks a GUI backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Axes of images have an aspect of their own: this layout puts them side by side without gaps.
    figure = Figure(figsize=(width, height), layout="compressed")
    cast(Any, figure.get_layout_engine()).set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG in print quality, cut to what is drawn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    replace_file(path, stream.getvalue())


def labels_figure(task: VisionTask, images: Tensor, labels: Tensor, predicted: Tensor) -> Any:
    """A figure of images (N, channels, H, W) in a row, each with its true and predicted class."""
    names = _literal(task.class_labels)
    width, height = _cell(images)
    figure = new_figure(width * len(images), height + 0.6)
    axes = figure.subplots(1, len(images), squeeze=False)
    for axis, image, true, guess in zip(axes[0], images, labels.tolist(), predicted.tolist(), strict=True):
        axis.imshow(as_pixels(image))
        counted = 0 <= true < len(names)
        label = names[true] if counted else "(ignored)"
        color = WRONG if counted and guess != true else RIGHT
        axis.set_title(f"{label}\n→ {names[guess]}", fontsize="small", color=color)
        axis.set_axis_off()
    return figure


def masks_figure(task: VisionTask, images: Tensor, masks: Tensor, predicted: Tensor) -> Any:
    """A figure with a row for each image (N, channels, H, W): image, true mask, predicted mask, overlay."""
    classes, ignored = task.model_config.num_classes, task.ignore_index
    colors = class_colors(classes)
    width, height = _cell(images)
    keys = _mask_keys(task, masks, predicted)
    key_height = 0.25 * math.ceil(len(keys) / KEY_COLUMNS)
    figure = new_figure(width * len(MASK_TITLES), height * len(images) + 0.3 + key_height)
    axes = figure.subplots(len(images), len(MASK_TITLES), squeeze=False)
    for row, image, true, guess in zip(axes, images, masks.numpy(), predicted.numpy(), strict=True):
        pixels = as_pixels(image)
        true_mask, predicted_mask = (colorize(mask, colors, ignored) for mask in (true, guess))
        shown = (pixels, true_mask, predicted_mask, overlay(pixels, guess, colors, ignored))
        for axis, panel in zip(row, shown, strict=True):
            axis.imshow(panel, interpolation="nearest" if panel is not pixels else None)
            axis.set_axis_off()
    for axis, title in zip(axes[0], MASK_TITLES, strict=True):
        axis.set_title(title, fontsize="medium")
    figure.legend(handles=keys, loc="outside lower center", ncols=KEY_COLUMNS, fontsize="small", frameon=False)
    return figure


def examples_figure(task: VisionTask, loader: DataLoader[Any], indices: Sequence[int]) -> Any:
    """A figure of labels or masks predicted for samples of a loader; None if they have no targets."""
    batch = samples_of(loader, indices)
    if batch.targets is None:
        return None
    draw = masks_figure if batch.targets.ndim > 1 else labels_figure
    predicted = _eval_logits(task, batch.images).argmax(1)
    return draw(task, batch.images, batch.targets.cpu(), predicted)  # a data set may hold them on a device


def confusion_figure(confusion: Tensor, names: Sequence[str]) -> Any:
    """A figure of a confusion matrix (true, predicted), as percents of each row."""
    counts = confusion.float()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(10.0, 2.5 + 0.4 * len(names))
    figure = new_figure(side + 0.8, side)
    axis = figure.subplots()
    drawn = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(names) <= MOST_TICKS:
        shown = _literal(names)
        axis.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        axis.set_yticks(range(len(names)), shown, fontsize="small")
    if len(names) <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > 0.5 else "black"
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize="x-small", color=color)
    figure.colorbar(drawn, shrink=0.8, format="{x:.0%}", label="of the true class")
    return figure


def as_pixels(image: Tensor) -> Pixels:
    """An image (channels, H, W) in [0, 1] as 8-bit pixels (H, W, 3): its first three channels, or its first as gray."""
    shown = image[: 3 if len(image) >= 3 else 1].clamp(0, 1) * 255
    pixels: Pixels = shown.round().byte().permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()
    return pixels


def _cell(images: Tensor) -> tuple[float, float]:
    """Width and height in inches of a cell of the aspect of images (N, channels, H, W), in any aspect as large."""
    height, width = images.shape[-2:]
    return INCHES * math.sqrt(width / height), INCHES * math.sqrt(height / width)


def _literal(names: Sequence[str]) -> list[str]:
    """Names that matplotlib shows as they are: what is between two dollars it takes for a formula."""
    return [name.replace("$", r"\$") for name in names]


def _mask_keys(task: VisionTask, masks: Tensor, predicted: Tensor) -> list[Any]:
    """A patch for each class that occurs, and one for ignored pixels."""
    from matplotlib.patches import Patch

    classes, names = task.model_config.num_classes, _literal(task.class_labels)
    colors = cast(Any, class_colors(classes) / 255)
    found = {*np.unique(masks.numpy()), *np.unique(predicted.numpy())}  # not stacked: torch promotes no uint16
    occurring = [i for i in range(classes) if i in found]
    keys = [Patch(facecolor=colors[i], label=names[i]) for i in occurring[:MOST_KEYS]]
    if bool((masks == task.ignore_index).any()):
        keys.append(Patch(facecolor=cast(Any, np.array(IGNORED) / 255), label=VOID))
    return keys


@torch.inference_mode()
def _eval_logits(task: VisionTask, images: Tensor) -> Tensor:
    """Logits of images in eval mode and the precision of the trainer; the mode of every module is restored."""
    with eval_mode(task), val_precision(task):
        logits: Tensor = task(images.to(task.device)).float().cpu()
    return logits
