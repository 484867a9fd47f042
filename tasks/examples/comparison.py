"""Frozen backbone, LoRA and full fine-tuning side by side: `python -m lora_plugins.tasks compare`.

On the data that is shipped. Each row is the run of `seg.yaml` or `cls.yaml` with the same seed, data and number of
epochs. What differs is what is trained: the new head alone, the head and LoRA, or everything; and the learning rate,
which for each of the three was chosen by a sweep on the val split.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lora_plugins.integrations.lightning import LoraCLI
from lora_plugins.tasks.training import VisionTask

QUIET = (
    "--trainer.callbacks=[{class_path: lora_plugins.tasks.CpuThreads, init_args: {threads: 1}}]",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)
NO_LORA = ("--lora=null",)
LORA_LEAVING_NOTHING = (
    "--lora_callback.save_adapter_to=null",
    "--lora_callback.export_to=null",
    "--lora_callback.print_plan=false",
)


@dataclass(frozen=True)
class Way:
    """One way of fine-tuning.

    Attributes:
        arguments: What it changes in the configuration.
        prepare: What it does to the task before training.
        rates: Learning rate for each configuration.
    """

    arguments: tuple[str, ...]
    prepare: Callable[[VisionTask], None]
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: the main metric on the val split, parameters trained and in all, seconds of training."""

    metric: str
    value: float
    trained: int
    total: int
    seconds: float


def leave(task: VisionTask) -> None:
    """Change nothing."""


def freeze_backbone(task: VisionTask) -> None:
    """Train the new head alone; normalization layers of what is frozen keep their statistics, as with LoRA."""
    task.network.eval()
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"{head}.") for head in task.head_modules))


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "frozen backbone": Way(NO_LORA, freeze_backbone, {"cls": 0.3, "seg": 0.1}),
        "LoRA": Way(LORA_LEAVING_NOTHING, leave, {"cls": 0.005, "seg": 0.005}),
        "full fine-tuning": Way(NO_LORA, leave, {"cls": 0.0005, "seg": 0.002}),
    }
)


class CountTrained(Callback):
    """Counts, when training starts, the parameters that are trained."""

    def __init__(self) -> None:
        self.trained = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)


def run(configuration: str, way: Way, *more: str) -> Outcome:
    """Train once.

    Args:
        configuration: `cls` or `seg`, the shipped YAML file of that name.
        way: What is trained.
        *more: Further command-line arguments, to change the configuration.
    """
    path = str(files("lora_plugins.tasks") / f"{configuration}.yaml")
    rate = f"--optimizer.init_args.lr={way.rates[configuration]}"
    cli = LoraCLI(args=["--config", path, *QUIET, *way.arguments, rate, *more], run=False)
    task, count = cli.model, CountTrained()
    total = sum(p.numel() for p in task.parameters())
    way.prepare(task)
    cli.trainer.callbacks.append(count)
    start = time.perf_counter()
    cli.trainer.fit(task, datamodule=cli.datamodule)
    seconds = time.perf_counter() - start
    value = float(cli.trainer.callback_metrics[f"val/{task.main_metric}"])
    return Outcome(task.main_metric, value, count.trained, total, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, and print the table; returns the exit code."""
    argparse.ArgumentParser(prog="python -m lora_plugins.tasks compare").parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    table = Table(title="What is trained, and what it comes to")
    for heading in ("run", "metric (val)", "trained", "share", "seconds"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for configuration in ("cls", "seg"):
        for name, way in WAYS.items():
            outcome = run(configuration, way)
            table.add_row(
                f"{configuration}.yaml, {name}",
                f"{outcome.metric} {outcome.value:.3f}",
                f"{outcome.trained:,}",
                f"{outcome.trained / outcome.total:.1%}",
                f"{outcome.seconds:.0f}",
            )
        table.add_section()
    Console().print(table)
    return 0
