"""Dreambooth with LoRA, without prior preservation, and in full, side by side: `... compare-dreambooth`.

Each row is `dreambooth.yaml` with three seeds: of the training and of the choice of the six pictures. The learning rate
of full fine-tuning was chosen by a sweep on the first seed.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lora_plugins.integrations.lightning import LoraCallback, LoraCLI
from lora_plugins.plan import parameter_counts
from lora_plugins.tasks.examples.read_digits import AFTER, BEFORE, ReadDigits

NO_PRIOR = ("--data.init_args.class_pictures=null",)
FULL = ("--lora=null", "--optimizer.init_args.lr=0.0003")
RUNS: Mapping[str, tuple[str, ...]] = {
    "LoRA": (),
    "LoRA, attention of the UNet alone": (
        "--model.init_args.layers=[attention]",
        "--model.init_args.train_text_encoder=false",
    ),
    "LoRA without prior preservation": NO_PRIOR,
    "full fine-tuning": FULL,
    "full fine-tuning without prior preservation": (*FULL, *NO_PRIOR),
}
"""By the name of a row, the arguments that it adds to `dreambooth.yaml`."""

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class DreamboothOutcome:
    """The result of a run.

    Attributes:
        before: The shares of samples of the subject and of the other digits that are read as asked.
        after: The same after the fit.
        trained: Trained parameters.
        total: All parameters.
        seconds: Processor time of the training steps.
    """

    before: tuple[float, float]
    after: tuple[float, float]
    trained: int
    total: int
    seconds: float


class _Clock(Callback):
    """Measures the training, and counts what is trained."""

    seconds, trained, total = 0.0, 0, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained, self.total = parameter_counts(pl_module)
        self._start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.process_time() - self._start


def run_dreambooth(seed: int, folder: str, *more: str) -> DreamboothOutcome:
    """Trains once; pictures, adapter and grids go into a folder, further arguments change `dreambooth.yaml`."""
    path = str(files("lora_plugins.tasks") / "dreambooth.yaml")
    arguments = [
        *("--config", path, "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *(
            f"--seed_everything={seed}",
            f"--data.init_args.seed={seed}",
            f"--data.init_args.root={folder}/pictures-{seed}",
        ),
        *("--lora_callback.print_plan=false", f"--lora_callback.save_adapter_to={folder}/adapter", *more),
    ]
    cli = LoraCLI(args=arguments, run=False)
    trainer, clock = cast(Any, cli.trainer), _Clock()
    kept = [callback for callback in trainer.callbacks if isinstance(callback, LoraCallback | ReadDigits)]
    (reader,) = [callback for callback in kept if isinstance(callback, ReadDigits)]
    reader.folder, reader.adapter = Path(folder), f"{folder}/adapter" if len(kept) > 1 else None
    trainer.callbacks = [clock, *kept]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return DreamboothOutcome(reader.shares[BEFORE], reader.shares[AFTER], clock.trained, clock.total, clock.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora_plugins.tasks compare-dreambooth")
    parser.add_argument("folder", nargs="?", default="runs/compare-dreambooth", help="where to write")
    folder = parser.parse_args(arguments).folder
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    table = Table(title="Share of samples read as asked, for each seed")
    for heading in ("run", "the new digit", "the old digits", "trained", "share", "seconds"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, more in RUNS.items():
        found = [run_dreambooth(seed, f"{folder}/{name.replace(' ', '-')}", *more) for seed in SEEDS]
        first = found[0]
        table.add_row(
            name,
            " ".join(f"{each.after[0]:.2f}" for each in found),
            " ".join(f"{each.after[1]:.2f}" for each in found),
            f"{first.trained:,}",
            f"{first.trained / first.total:.1%}",
            f"{sum(each.seconds for each in found) / len(found):.0f}",
        )
    Console(width=140).print(table)
    return 0
