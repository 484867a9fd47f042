"""A picture of predicted masks beside the true ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lora_plugins import ConfigError
from lora_plugins.field_checks import Check, check_count, check_fields
from lora_plugins.integrations.lightning.console import tell_written
from lora_plugins.integrations.lightning.writer import check_by_writer, writes_files
from lora_plugins.tasks.argument_checks import check_indices, check_png, instance_of
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.reporting.figures import examples_figure, save_figure
from lora_plugins.tasks.reporting.sample_choice import on_device_of
from lora_plugins.tasks.reporting.val_loaders import evenly_spaced, first_val_loader, has_places, has_validated
from lora_plugins.tasks.segmentation import SemanticSegmentationTask
from lora_plugins.writable import check_writable_file, from_home

_CHECKS: Mapping[str, Check] = {
    "task": instance_of(SemanticSegmentationTask),
    "loader": instance_of(DataLoader),
    "indices": check_indices,
    "path": check_png,
}
"""What the arguments of `draw_predictions` can be."""


def draw_predictions(
    task: SemanticSegmentationTask, loader: DataLoader[Any], indices: Sequence[int], path: str | Path
) -> Path:
    """Writes a PNG with a row for each of the given samples: image, true mask, predicted mask, overlay.

    Args:
        task: The task; it predicts in eval mode, and its mode is restored.
        loader: The loader whose data set holds the samples.
        indices: The indices of the samples in the data set.
        path: The file to write; its folder is created.

    Returns:
        The path.

    Raises:
        ConfigError: If an argument is of another type.
        DataError: If the samples have no masks.
    """
    given = {"task": task, "loader": loader, "indices": indices, "path": path}
    check_fields(given, _CHECKS)
    figure = examples_figure(task, loader, indices)
    if figure is None:
        raise DataError("A picture of predictions needs samples with masks.")
    save_figure(figure, Path(path))
    return Path(path)


class PredictionPicture(Callback):
    """Writes a picture of predicted masks beside the true ones at the end of a fit, and prints its path.

    Args:
        path: The PNG to write.
        samples: The number of samples of the val split to show, evenly spaced over it.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(self, path: str, samples: int = 4) -> None:
        check_png("path", path)
        check_count("samples", samples)
        self.path, self.samples = from_home(path), samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks before training that there will be masks to draw.

        Raises:
            ConfigError: For a module that does not segment.
        """
        if not isinstance(pl_module, SemanticSegmentationTask):
            raise ConfigError(
                f"PredictionPicture draws masks; {type(pl_module).__name__} is no SemanticSegmentationTask."
            )
        if stage == "fit":
            check_by_writer(trainer, lambda: check_writable_file(Path(self.path), "path of PredictionPicture"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the picture for samples of the first val loader, by the weights that the callbacks leave."""
        if stage != "fit" or not writes_files(trainer) or not has_validated(trainer, "picture of predictions"):
            return
        task, loader = cast(SemanticSegmentationTask, pl_module), first_val_loader(trainer)
        if not has_places(loader):
            rank_zero_warn(
                "There is no picture of predictions: samples of a stream, or of batches without a data set, cannot be "
                "read again."
            )
            return
        with on_device_of(trainer, task):
            path = draw_predictions(task, loader, evenly_spaced(loader, self.samples), self.path)
        tell_written(trainer, {"Picture of predictions": path})
