"""A callback that leaves a pipeline folder with the trained weights in it."""

from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_plugins import ConfigError
from lora_plugins.adapter import model_state
from lora_plugins.integrations.lightning.callback import lora_callbacks
from lora_plugins.integrations.lightning.console import tell_written
from lora_plugins.integrations.lightning.writer import check_by_writer, writes_files
from lora_plugins.tasks.argument_checks import check_path
from lora_plugins.tasks.diffusion.packaged import INDEX, pipeline_source
from lora_plugins.tasks.diffusion.text_to_image import TextToImageTask
from lora_plugins.writable import check_writable_folder, from_home

_NOT_MERGED = "SavePipeline needs the adapter merged. Set `merge_on_fit_end: true` of the LoraCallback."


class SavePipeline(Callback):
    """Writes the whole pipeline when a fit ends, for `DiffusionPipeline.from_pretrained`.

    An adapter is merged then, as `merge_on_fit_end` of the LoraCallback has it by default.

    Args:
        folder: The folder of the pipeline.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(self, folder: str) -> None:
        check_path("folder", folder)
        self.folder = Path(from_home(folder))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is a task with a pipeline, that its adapters will be merged, and a place to write to.

        Raises:
            ConfigError: For another module, adapters that stay, or a folder that cannot be written, or is the base's.
        """
        if not isinstance(pl_module, TextToImageTask):
            raise ConfigError(
                f"SavePipeline needs a TextToImageTask, and the module is of the class {type(pl_module).__name__}."
            )
        if stage != "fit":
            return
        if not all(each.merge_on_fit_end for each in lora_callbacks(trainer)):
            raise ConfigError(_NOT_MERGED)
        if self.folder.resolve() == Path(pipeline_source(pl_module.model)).resolve():
            raise ConfigError(
                f"folder of SavePipeline is {self.folder}, which the pipeline is read from: it would be replaced. Name "
                "a new folder."
            )
        check_by_writer(trainer, lambda: check_writable_folder(self.folder, "folder of SavePipeline"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the folder, now that every callback has ended the fit, whatever their order.

        Raises:
            ConfigError: If an adapter is not merged: its layers would be written without it.
        """
        if stage != "fit" or not writes_files(trainer):
            return
        task = cast(TextToImageTask, pl_module)
        if model_state(task.parts) is not None:
            raise ConfigError(_NOT_MERGED)
        # Written last, it makes a pipeline of the folder: a process killed before leaves none of old and new parts.
        (self.folder / INDEX).unlink(missing_ok=True)
        task.pipe.save_pretrained(self.folder)
        tell_written(trainer, {"Merged pipeline": self.folder})
