"""A picture of what a segmenter sees: image, true mask and predicted mask, a row a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from lora_plugins import ConfigError
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.segmentation.task import SemanticSegmentationTask

TITLES = ("image", "true mask", "predicted mask")
IGNORED_COLOUR = (0.5, 0.5, 0.5, 1.0)
INCHES = 2.0


def draw_predictions(
    task: SemanticSegmentationTask, loader: DataLoader[Any], indices: Sequence[int], path: str | Path
) -> Path:
    """Write one PNG with a row for each of some samples of a data loader: image, true mask, predicted mask.

    Args:
        task: The task, whose network predicts in evaluation mode and is put back into the mode it was in.
        loader: The loader whose data set holds the samples.
        indices: Which samples of the data set.
        path: The file to write; its folder is made.

    Returns:
        The path.

    Raises:
        DataError: Where the samples have no masks.
    """
    collate = loader.collate_fn
    batch = Batch.read(collate([loader.dataset[i] for i in indices]))
    if batch.targets is None:
        raise DataError("A picture of predictions needs samples with masks.")
    predicted = _predict(task, batch.images)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw(task, batch.images, batch.targets, predicted, path)
    return path


class PredictionPicture(Callback):
    """Writes a picture of predicted masks beside the true ones when a fit has ended, and prints where.

    Args:
        path: The PNG to write.
        samples: How many samples of the val split to show, evenly spread over it.
    """

    def __init__(self, path: str, samples: int = 4) -> None:
        if samples < 1:
            raise ConfigError(f"samples is {samples}; a picture shows at least one.")
        self.path, self.samples = path, samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that there will be masks to draw.

        Raises:
            ConfigError: For a module that does not segment.
        """
        if not isinstance(pl_module, SemanticSegmentationTask):
            raise ConfigError(
                f"PredictionPicture draws masks; {type(pl_module).__name__} is no SemanticSegmentationTask."
            )

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture of the first val loader's samples."""
        loaders = trainer.val_dataloaders
        loader: DataLoader[Any] = cast(Any, loaders[0] if isinstance(loaders, list) else loaders)
        total = len(loader.dataset)
        indices = np.linspace(0, total - 1, min(self.samples, total)).round().astype(int).tolist()
        path = draw_predictions(cast(SemanticSegmentationTask, pl_module), loader, indices, self.path)
        Console().print(f"Picture of predictions: [bold]{path}[/bold]", soft_wrap=True)


def _predict(task: SemanticSegmentationTask, images: Tensor) -> Tensor:
    training = {module: module.training for module in task.modules()}
    task.eval()
    try:
        with torch.inference_mode():
            logits: Tensor = task(images.to(task.device))
            return logits.argmax(1).cpu()
    finally:
        for module, mode in training.items():
            module.training = mode


def _draw(task: SemanticSegmentationTask, images: Tensor, masks: Tensor, predicted: Tensor, path: Path) -> None:
    # Figure and canvas are made by hand: pyplot would keep a global list of figures and choose a window system.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    classes = task.model_config.num_classes
    names = task.class_names or [str(i) for i in range(classes)]
    colours = _colours(colormaps["gist_rainbow"], classes)
    rows = len(images)
    figure = Figure(figsize=(INCHES * len(TITLES), INCHES * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(TITLES), squeeze=False)
    for row, sample in zip(axes, zip(images, masks, predicted, strict=True), strict=True):
        image, true, guess = sample
        row[0].imshow(image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy())
        row[1].imshow(_coloured(true, colours, task.ignore_index))
        row[2].imshow(_coloured(guess, colours, task.ignore_index))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title)
    patches = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(classes, 7), fontsize="small")
    figure.savefig(path, dpi=100)


def _colours(colormap: Any, classes: int) -> np.ndarray:
    """A colour (r, g, b, a) for each class: dark for class 0, which mostly is the ground, a rainbow for the others."""
    return np.concatenate([[[0.08, 0.08, 0.08, 1.0]], colormap(np.linspace(0, 1, max(1, classes - 1)))])[:classes]


def _coloured(mask: Tensor, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """A mask (H, W) as a picture (H, W, 4), ignored pixels in grey."""
    ignored = (mask == ignore_index).numpy()
    picture: np.ndarray = colours[mask.masked_fill(mask == ignore_index, 0).numpy()]
    picture[ignored] = IGNORED_COLOUR
    return picture
