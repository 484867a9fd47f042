"""The end of a fit: where everything is, and the commands to go on with."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from lora_plugins.integrations.lightning.callback import lora_callbacks
from lora_plugins.integrations.lightning.checkpoint import written_by
from lora_plugins.integrations.lightning.console import FitConsole
from lora_plugins.integrations.lightning.writer import writes_files

PROGRAM = "lora-plugins"


def closing_lines(
    trainer: Trainer,
    module: LightningModule,
    console: FitConsole,
    configs: Sequence[str],
    *,
    stopped: bool,
    alone: bool,
) -> list[str]:
    """Returns what is printed at the end of a fit.

    A module may name the next commands itself, by a method `next_commands(trainer)` that returns them by what they do.
    Otherwise they validate the checkpoint, if the fit validated, inspect the adapter, and load the module.

    `stopped` says whether Ctrl-C ended the fit, `alone` whether one configuration said everything, and no flag.
    """
    files = {**console.written, **_files_of_lightning(trainer)}
    whole = Path(str(files.get("Log", ""))) / "config.yaml"  # what Lightning saves, with all that was given
    saved = [str(whole)] if whole.is_file() else configs
    if files and (given := configs if alone else saved):
        files["Configuration"] = given[-1]
    own = getattr(module, "next_commands", None)
    commands: list[str] = list(own(trainer).values()) if callable(own) else []
    head = "Stopped by Ctrl-C. Saved:" if stopped else "Saved:"
    lines = ["", head, *(f"  {what}: {path}" for what, path in files.items())] if files else []
    validated = _commands(files, saved) if trainer.enable_validation else []
    following = (commands or validated) + _inspection(trainer)
    following = (following + console.to_paste)[:3]
    if not following or not writes_files(trainer):  # as in a fast_dev_run, which leaves none to go on with
        return lines
    return [*lines, "Next:", *(f"  {line}" for line in following)]


def _files_of_lightning(trainer: Trainer) -> dict[str, Any]:
    run = cast(Any, trainer)  # whose types lack some attributes
    stored = [path for path in written_by(run.checkpoint_callbacks) if Path(path).exists()]
    # Not the trainer's log_dir, which asks the other processes, and these have ended.
    log = run.logger and (getattr(run.logger, "log_dir", None) or run.logger.save_dir)
    found = {"Checkpoint": next(iter(stored), None), "Log": log}
    return {what: path for what, path in found.items() if path}


def _commands(files: dict[str, Any], configs: Sequence[str]) -> list[str]:
    if "Checkpoint" not in files or not configs:
        return []
    given = " ".join(f"--config {shlex.quote(path)}" for path in configs)
    return [f"{PROGRAM} validate {given} --ckpt_path {shlex.quote(str(files['Checkpoint']))}"]


def _inspection(trainer: Trainer) -> list[str]:
    paths = [
        file.path for callback in lora_callbacks(trainer) for file in callback.adapter_files if Path(file.path).exists()
    ]
    return [f"{PROGRAM} inspect {shlex.quote(path)}" for path in paths[:1]]
