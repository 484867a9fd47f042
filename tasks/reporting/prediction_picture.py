"""A picture of predictions: each image beside its true mask, the predicted one, and that over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from lora_plugins import ConfigError
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.reporting.figures import first_loader, masks_figure, predicted_logits, spread
from lora_plugins.tasks.segmentation import SemanticSegmentationTask


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
