"""A callback that reports what a classifier reads in samples, before a fit, after it, and after a reset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL.Image import Image
from rich.console import Console
from rich.table import Table

from lora_plugins.field_checks import Check, check_count, check_fields, check_name, check_whole, map_of, optional
from lora_plugins.integrations.diffusers import LoraPipeline, Sampling, contact_sheet, sample
from lora_plugins.tasks.argument_checks import check_path, instance_of
from lora_plugins.tasks.diffusion import TextToImageTask, without_adapters
from lora_plugins.tasks.examples.digit_reader import DigitReader
from lora_plugins.tasks.files import as_png
from lora_plugins.utils import replace_file
from lora_plugins.writable import from_home

BEFORE, AFTER, RESET = "before", "after", "reset"

_CHECKS: Mapping[str, Check] = {
    "folder": check_path,
    "digits": map_of(check_whole),
    "subject": check_name,
    "pictures": check_count,
    "subject_pictures": check_count,
    "adapter": optional(check_path),
    "sampling": optional(instance_of(Sampling)),
}
"""What the arguments can be, by name."""


class ReadDigits(Callback):
    """Prints the share of samples that a classifier reads as asked.

    After a fit, the adapter is loaded from its folder onto the base model once more, sampled, and unloaded again: the
    samples have to be those from before, pixel by pixel. Grids are left as `digits-before.png`, `digits-after.png` and
    `digits-reset.png`.

    Args:
        folder: Where the grids are written.
        digits: The digit that is asked for, by prompt.
        subject: The prompt of the new subject.
        pictures: How many samples of each prompt.
        subject_pictures: How many of the new subject.
        adapter: The adapter's folder, as the LoraCallback has it; None if there is none.
        sampling: How they are sampled.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        folder: str,
        digits: dict[str, int],
        subject: str,
        pictures: int = 12,
        subject_pictures: int = 40,
        adapter: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        given = {"folder": folder, "digits": digits, "subject": subject, "adapter": adapter, "sampling": sampling}
        check_fields({**given, "pictures": pictures, "subject_pictures": subject_pictures}, _CHECKS)
        self.folder, self.digits, self.subject, self.adapter = Path(from_home(folder)), digits, subject, adapter
        self.counts = {prompt: subject_pictures if prompt == subject else pictures for prompt in digits}
        self.sampling = sampling or Sampling()
        self.shares: dict[str, tuple[float, float]] = {}
        self._before: Sequence[Image] = ()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples the base model."""
        task = cast(TextToImageTask, pl_module)
        with without_adapters(task.parts):
            self._before = self._sampled(task)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples the trained model, and the base model again; writes and prints."""
        task, reader = cast(TextToImageTask, pl_module), DigitReader()
        found = {BEFORE: self._before}
        if self.adapter is None:
            found[AFTER] = self._sampled(task)
        else:
            pipe = TextToImageTask(**task.hparams).pipe  # of its revision, type and prediction
            lora = LoraPipeline.load_adapter(pipe, self.adapter)
            pipe.to(trainer.strategy.root_device)
            found[AFTER] = self._sampled_by(pipe)
            lora.unload()
            found[RESET] = self._sampled_by(pipe)
        self.shares = {name: self._read(reader, pictures) for name, pictures in found.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, pictures in found.items():
            replace_file(self.folder / f"digits-{name}.png", as_png(contact_sheet(self._rows(pictures))))
        before, reset = ([p.tobytes() for p in pictures] for pictures in (self._before, found.get(RESET, ())))
        self._print(same=before == reset)

    def _prompts(self) -> list[str]:
        return [prompt for prompt, count in self.counts.items() for _ in range(count)]

    def _sampled(self, task: TextToImageTask) -> list[Image]:
        with task.on_device() as pipe:
            return self._sampled_by(pipe)

    def _sampled_by(self, pipe: object) -> list[Image]:
        prompts = self._prompts()
        return sample(pipe, prompts, range(len(prompts)), self.sampling)

    def _rows(self, pictures: Sequence[Image]) -> dict[str, list[Image]]:
        prompts = self._prompts()
        return {
            prompt: [picture for picture, own in zip(pictures, prompts, strict=True) if own == prompt][:12]
            for prompt in self.counts
        }

    def _read(self, reader: DigitReader, pictures: Sequence[Image]) -> tuple[float, float]:
        """The shares of the subject and of the other digits that are read as asked."""
        right = [
            (prompt == self.subject, seen == self.digits[prompt])
            for prompt, seen in zip(self._prompts(), reader.read(pictures), strict=True)
        ]
        shares = [[hit for is_subject, hit in right if is_subject == subject] for subject in (True, False)]
        subject, others = (sum(hits) / max(1, len(hits)) for hits in shares)
        return subject, others

    def _print(self, *, same: bool) -> None:
        table = Table(title="Share of samples that a classifier reads as asked")
        for heading in ("", self.subject, "the other digits"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, (subject, others) in self.shares.items():
            table.add_row(name, f"{subject:.2f}", f"{others:.2f}")
        console = Console()
        console.print(table)
        if RESET in self.shares:
            console.print(
                f"After reset, samples are {'the same as' if same else 'NOT those from'} before, bit for bit."
            )
