"""A callback that samples the same prompts with the same seeds before, during and after a fit, and reports."""

import time
from base64 import b64encode
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL.Image import Image

from lora_plugins import ConfigError, LoraModel
from lora_plugins.adapter import model_state
from lora_plugins.field_checks import check_count, optional
from lora_plugins.integrations.diffusers import Sampling, contact_sheet
from lora_plugins.integrations.lightning.console import tell_written
from lora_plugins.integrations.lightning.writer import check_by_writer, writes_files
from lora_plugins.plan import LayerGroup, parameter_counts
from lora_plugins.tasks.argument_checks import check_path, check_texts, instance_of
from lora_plugins.tasks.diffusion.picture_rows import sample_rows
from lora_plugins.tasks.diffusion.text_to_image import TextToImageTask, without_adapters
from lora_plugins.tasks.files import as_png
from lora_plugins.tasks.pages import SampleRecord, render_samples
from lora_plugins.utils import replace_file
from lora_plugins.writable import check_writable_folder, from_home

BEFORE, AFTER, REPORT = "before", "after", "report.html"


class SamplePictures(Callback):
    """Samples prompts with fixed seeds: of the base model, after epochs, and at the end.

    Pictures go to TensorBoard, where the trainer has one, and to `before.png`, `after.png` and `report.html` in a
    folder. A sample does not change the training: torch's random numbers stay as they are.

    Args:
        folder: The folder.
        prompts: The prompts.
        pictures: How many pictures of each prompt, with the seeds 0, 1, ...
        sampling: How they are sampled.
        every: The number of epochs from one time to the next.

    Raises:
        ConfigError: If there are no prompts, one is empty, or a number is none.
    """

    def __init__(
        self, folder: str, prompts: list[str], pictures: int = 4, sampling: Sampling | None = None, every: int = 1
    ) -> None:
        check_path("folder", folder)
        optional(instance_of(Sampling))("sampling", sampling)
        check_texts("prompts", prompts)
        check_count("pictures", pictures)
        check_count("every", every)
        self.folder, self.prompts, self.pictures, self.every = Path(from_home(folder)), prompts, pictures, every
        self.sampling = sampling or Sampling()
        self._reset()

    def _reset(self) -> None:
        self._sheets: dict[str, Image] = {}
        self._losses: dict[str, list[tuple[int, float]]] = {}
        self._plan: list[LayerGroup] = []
        self._summary, self._trained, self._total, self._start = "", 0, 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is a task that draws, and a place to write to.

        Raises:
            ConfigError: For another module, or a folder that cannot be written.
        """
        if not isinstance(pl_module, TextToImageTask):
            raise ConfigError(
                f"SamplePictures needs a TextToImageTask, and the module is of the class {type(pl_module).__name__}."
            )
        if stage == "fit":
            check_by_writer(trainer, lambda: check_writable_folder(self.folder, "folder of SamplePictures"))
        self._reset()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples the base model."""
        task = cast(TextToImageTask, pl_module)
        self._trained, self._total = parameter_counts(task.parts)
        if model_state(task.parts) is not None:
            plans = LoraModel(task.parts).plans.values()
            self._plan = [group for plan in plans for group in plan.groups()]
            self._summary = " ".join(plan.summary() for plan in plans)
        with without_adapters(task.parts):
            self._add(trainer, task, BEFORE)
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples, and records the losses of the epoch, for which all processes ask each other."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/"):
                self._losses.setdefault(name, []).append((trainer.current_epoch + 1, float(value)))
        if trainer.is_global_zero and (trainer.current_epoch + 1) % self.every == 0:
            self._add(trainer, cast(TextToImageTask, pl_module), f"epoch {trainer.current_epoch + 1}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples, and writes the files, where something was trained."""
        if not writes_files(trainer) or BEFORE not in self._sheets:
            return
        seconds = time.perf_counter() - self._start
        self._add(trainer, cast(TextToImageTask, pl_module), AFTER)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (BEFORE, AFTER):
            replace_file(self.folder / f"{name}.png", as_png(self._sheets[name]))
        replace_file(self.folder / REPORT, self._page(trainer, cast(TextToImageTask, pl_module), seconds).encode())
        tell_written(trainer, {"Samples and report": self.folder})

    def _add(self, trainer: Trainer, task: TextToImageTask, name: str) -> None:
        with task.on_device() as pipe:
            rows = sample_rows(pipe, self.prompts, self.pictures, self.sampling)
        self._sheets[name] = contact_sheet(dict(zip(self.prompts, rows, strict=True)))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(self._sheets[name])
                cast(Any, logger.experiment).add_image("samples", pixels, trainer.global_step, dataformats="HWC")

    def _page(self, trainer: Trainer, task: TextToImageTask, seconds: float) -> str:
        share = self._trained / max(1, self._total)
        facts = {
            "model": f"{task.model} ({task.family.name})",
            "parameters trained": f"{self._trained:,} of {self._total:,} ({share:.2%})",
            "steps": str(trainer.global_step),
            "time of the fit": f"{seconds:.1f} s",
        }
        losses = {name.removeprefix("train/"): points for name, points in self._losses.items()}
        sheets = {name.capitalize(): _as_url(sheet) for name, sheet in self._sheets.items()}
        return render_samples(SampleRecord(str(task.model), self._summary, facts, self._plan, losses, sheets))


def _as_url(sheet: Image) -> str:
    return "data:image/png;base64," + b64encode(as_png(sheet)).decode()
