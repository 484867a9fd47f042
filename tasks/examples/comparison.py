"""Frozen backbone, LoRA and full fine-tuning side by side: `python -m lora_plugins.tasks compare`.

On the embedded data. Each row is a run of `seg.yaml` or `cls.yaml` with the same seed, data and number of epochs. The
runs differ in what is trained (the new head alone, the head and LoRA, or everything), and in the learning rate, which
was chosen for each of the three by a sweep; docs/settings.md says which rates were tried.
"""

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from rich.table import Table

from lora_plugins.integrations.lightning import LoraCLI
from lora_plugins.plan import parameter_counts
from lora_plugins.tasks.training import VisionTask

QUIET = (
    "--trainer.callbacks=null",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)
NO_LORA = ("--lora=null",)
LORA_WITHOUT_FILES = (
    "--lora_callback.save_adapter_to=null",
    "--lora_callback.export_to=null",
    "--lora_callback.print_plan=false",
)


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning: arguments that it adds to a command, what prepares its task, and learning rates."""

    arguments: tuple[str, ...]
    prepare: Callable[[VisionTask], None]
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """The result of a run: the main metric on the val split, trained and all parameters, seconds of training."""

    metric: str
    value: float
    trained: int
    total: int
    seconds: float


def unchanged(task: VisionTask) -> None:
    """Leaves the task as it is."""


def freeze_backbone(task: VisionTask) -> None:
    """Trains the new head alone; frozen normalization layers keep their statistics, as with LoRA."""
    task.network.eval()
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"{head}.") for head in task.head_modules))


METHODS: Mapping[str, Method] = {
    "frozen backbone": Method(NO_LORA, freeze_backbone, {"cls": 0.3, "seg": 0.1}),
    "LoRA": Method(LORA_WITHOUT_FILES, unchanged, {"cls": 0.005, "seg": 0.005}),
    "full fine-tuning": Method(NO_LORA, unchanged, {"cls": 0.0005, "seg": 0.002}),
}


def run(configuration: str, method: Method, *more: str) -> Outcome:
    """Trains `cls` or `seg`, the shipped YAML file of that name, once, with further arguments of the command line."""
    path = str(files("lora_plugins.tasks") / f"{configuration}.yaml")
    rate = f"--model.init_args.lr={method.rates[configuration]}"
    cli = LoraCLI(args=["--config", path, *QUIET, *method.arguments, rate, *more], run=False)
    task, trained = cli.model, list[int]()
    total = sum(p.numel() for p in task.parameters())
    method.prepare(task)
    count = LambdaCallback(on_train_start=lambda _, module: trained.append(parameter_counts(module)[0]))
    cast(Any, cli.trainer).callbacks.append(count)  # an attribute that its types lack
    start = time.perf_counter()
    cli.trainer.fit(task, datamodule=cli.datamodule)
    seconds = time.perf_counter() - start
    value = float(cli.trainer.callback_metrics[f"val/{task.main_metric}"])
    return Outcome(task.main_metric, value, trained[0], total, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all methods and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora_plugins.tasks compare")
    parser.add_argument("--seed", type=int, default=0, help="of the new head, the adapters and the order of the data")
    seed = f"--seed_everything={parser.parse_args(arguments).seed}"
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    table = Table(title="What is trained, and what it comes to")
    for heading in ("run", "metric (val)", "trained", "share", "seconds"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for configuration in ("cls", "seg"):
        for name, method in METHODS.items():
            outcome = run(configuration, method, seed)
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
