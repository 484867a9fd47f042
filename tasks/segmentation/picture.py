"""A picture of predictions: each image beside its true mask, the predicted one, and that over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from lora_plugins import ConfigError
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.figures import blank, first_loader, predicted_logits, spread
from lora_plugins.tasks.segmentation.colors import class_colors, colored, overlay
from lora_plugins.tasks.segmentation.task import SemanticSegmentationTask

TITLES = ("image", "true mask", "predicted mask", "overlay")
INCHES = 2.0
COLUMNS = 5
MOST_NAMES = 25
"""The key names the classes that occur, up to as many as fit under a picture."""


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
    predicted = predicted_logits(task, batch.images).argmax(1)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    masks_figure(task, batch.images, batch.targets, predicted).savefig(path, dpi=100)
    return path


def masks_figure(task: SemanticSegmentationTask, images: Tensor, masks: Tensor, predicted: Tensor) -> Any:
    """A figure with a row for each image (N, channels, H, W): itself, its true mask, the predicted one, the overlay."""
    from matplotlib.patches import Patch

    classes, ignored = task.model_config.num_classes, task.ignore_index
    names = task.class_names or [str(i) for i in range(classes)]
    colors = class_colors(classes)
    figure = blank(INCHES * len(TITLES), INCHES * len(images) + 0.6)
    axes = figure.subplots(len(images), len(TITLES), squeeze=False)
    for row, image, true, guess in zip(axes, images, masks.numpy(), predicted.numpy(), strict=True):
        pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        drawn = (colored(true, colors, ignored), colored(guess, colors, ignored))
        for axis, picture in zip(row, (pixels, *drawn, overlay(pixels, guess, colors, ignored)), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title)
    shown = [i for i in range(classes) if bool(((masks == i) | (predicted == i)).any())][:MOST_NAMES]
    patches = [Patch(color=colors[i] / 255, label=names[i]) for i in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=COLUMNS, fontsize="small")
    return figure


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
        loader = first_loader(trainer)
        indices = spread(len(cast(Any, loader.dataset)), self.samples)
        path = draw_predictions(cast(SemanticSegmentationTask, pl_module), loader, indices, self.path)
        Console().print(f"Picture of predictions: [bold]{path}[/bold]", soft_wrap=True)
