"""The table of commands, which the entry point `lightning` of the group `lora_plugins.commands` names."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from lora_plugins.cli import Command


def _trainer(arguments: list[str]) -> int:
    from lora_plugins.integrations.lightning.cli.lora_cli import LoraCLI  # noqa: PLC0415

    with _given_arguments():
        LoraCLI(args=arguments)
    return 0


def _plan(arguments: list[str]) -> int:
    from lora_plugins.integrations.lightning.cli.lora_cli import PlanCLI  # noqa: PLC0415

    with _given_arguments():
        PlanCLI(args=["fit", *arguments[1:]])
    return 0


def _merged_file(arguments: list[str]) -> int:
    from lora_plugins.integrations.lightning.cli import merged_files  # noqa: PLC0415

    with _given_arguments():
        merged_files.run(arguments)
    return 0


def _command(run: Callable[[list[str]], int], summary: str, options_first: bool = False) -> Command:
    needs = ("lightning", "jsonargparse", "rich", "yaml")  # yaml comes with jsonargparse
    return Command(summary, run, needs, "lora-plugins[lightning]", options_first)


COMMANDS: Mapping[str, Command] = {
    "fit": _command(_trainer, "train, as a YAML file says", options_first=True),
    "validate": _command(_trainer, "measure on the validation split", options_first=True),
    "test": _command(_trainer, "measure on the test split", options_first=True),
    "predict": _command(_trainer, "predict", options_first=True),
    "plan": _command(_plan, "print what fit would adapt, and train nothing"),
    "export": _command(_merged_file, "write a checkpoint's merged network as a plain .safetensors file"),
    "merge": _command(_merged_file, "write a checkpoint with its adapter merged, for load_from_checkpoint"),
}


@contextmanager
def _given_arguments() -> Iterator[None]:
    """Lets LightningCLI run on arguments that it did not read from the process itself.

    Modules of the current folder can be named in `class_path`, as with `python -m`. LightningCLI's warning that the
    process has arguments too is silenced: they are the same.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        yield
