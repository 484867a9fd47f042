"""A callback that leaves a pipeline folder with the trained weights in it."""

from pathlib import Path
from typing import cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_plugins import ConfigError
from lora_plugins.adapter import model_state
from lora_plugins.integrations.lightning.console import tell_written
from lora_plugins.tasks.diffusion.text_to_image import TextToImageTask


class SavePipeline(Callback):
    """Writes the whole pipeline when a fit ends, for `DiffusionPipeline.from_pretrained`.

    An adapter is merged then, as `merge_on_fit_end` of the LoraCallback has it by default.

    Args:
        folder: The folder of the pipeline.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a task with a pipeline.

        Raises:
            ConfigError: For another module.
        """
        if not isinstance(pl_module, TextToImageTask):
            raise ConfigError(f"SavePipeline needs a TextToImageTask; {type(pl_module).__name__} is none.")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder.

        Raises:
            ConfigError: If an adapter is not merged: its layers would be written without it.
        """
        task = cast(TextToImageTask, pl_module)
        if model_state(task.parts) is not None:
            raise ConfigError(
                "SavePipeline needs the adapter merged. Set `merge_on_fit_end: true` of the LoraCallback."
            )
        task.pipe.save_pretrained(self.folder)
        tell_written(trainer, {"Merged pipeline": self.folder})
