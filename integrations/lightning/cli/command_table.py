"""The table of commands, which the entry point `lightning` of the group `lora_plugins.commands` names."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from lora_plugins.cli import INTERRUPTED, Command, importing, without_collections
from lora_plugins.errors import ConfigError
from lora_plugins.integrations.lightning.cli.noise import quiet


def _prepared(arguments: list[str], *, adapts: bool, writes: bool = False) -> list[str]:
    """Expands short flags, and looks for mistakes before anything heavy but torch, which plugins need, is imported."""
    for name in _NEEDS:
        _look_for(name)
    from lora_plugins.integrations.lightning.cli.preflight import check  # noqa: PLC0415
    from lora_plugins.integrations.lightning.cli.short_flags import SHORT, expanded  # noqa: PLC0415

    written = ["--help" if argument == "--help-all" else argument for argument in expanded(arguments)]
    command = _named_command(written)
    given = [*written]
    given.remove(command)  # once: a value may be the same word, as in --data.init_args.split test
    config = check(given, tuple(SHORT), command=command, writes=writes)
    if adapts and config is not None:
        with _given_arguments(), without_collections():
            from lora_plugins.plan import named_plugins  # noqa: PLC0415
            from lora_plugins.plugins import registry_of  # noqa: PLC0415

            named_plugins(config, registry_of(config))
    return written


def _trainer(arguments: list[str]) -> int:
    if _asks_for_help(arguments):
        return _print_help(_named_command(arguments))
    fits = _given_command(arguments) == "fit" and not _prints(arguments)
    return _run_cli(_prepared(arguments, adapts=fits, writes=fits))


def _plan(arguments: list[str]) -> int:
    if _asks_for_help(arguments):
        return _print_help("plan")
    return _run_cli(_prepared(["fit", *arguments[1:]], adapts=not _prints(arguments)), plans=True)


def _run_cli(prepared: list[str], *, plans: bool = False) -> int:
    with quiet(), importing():
        from lora_plugins.integrations.lightning.cli.explained import explained_run  # noqa: PLC0415
        from lora_plugins.integrations.lightning.cli.lora_cli import LoraCLI, PlanCLI  # noqa: PLC0415

    with _given_arguments(), explained_run():
        cli = (PlanCLI if plans else LoraCLI)(args=prepared)
    return INTERRUPTED if cli.interruption.asked else 0


def _asks_for_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def _print_help(command: str) -> int:
    from lora_plugins.integrations.lightning.cli.help_page import help_page  # noqa: PLC0415

    print(help_page(command))
    return 0


def _given_command(arguments: list[str]) -> str | None:
    """The command, which options may precede; None if there is none."""
    return next((argument for argument in arguments if argument in _TRAINER_COMMANDS), None)


def _named_command(arguments: list[str]) -> str:
    """The command, or an error if there is none."""
    named = _given_command(arguments)
    if named is None:
        raise ConfigError(f"{arguments[0]} is given, and no command: lora-plugins fit {arguments[0]} ...")
    return named


def _prints(arguments: list[str]) -> bool:
    return any(argument.startswith("--print_config") for argument in arguments)


def _merged_file(arguments: list[str]) -> int:
    from lora_plugins.integrations.lightning.cli.merged_file_parser import merged_file_parser  # noqa: PLC0415

    given = merged_file_parser(arguments[0]).parse_args(arguments[1:])  # before Lightning is imported
    with importing():
        from lora_plugins.integrations.lightning.cli import merged_files  # noqa: PLC0415

    with _given_arguments():
        merged_files.run(arguments[0], given)
    return 0


_NEEDS = ("lightning", "jsonargparse", "rich", "yaml")  # yaml comes with jsonargparse


def _look_for(name: str) -> None:
    """Raises the error that an import would raise, without the time that it takes."""
    if (name in sys.modules and sys.modules[name] is None) or (name not in sys.modules and find_spec(name) is None):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _command(run: Callable[[list[str]], int], summary: str, options_first: bool = False) -> Command:
    return Command(summary, run, _NEEDS, "lora-plugins[lightning]", options_first)


def _recipes(arguments: list[str]) -> int:
    from lora_plugins.integrations.lightning.cli.recipes import run  # noqa: PLC0415

    return run(arguments[1:])


_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

COMMANDS: Mapping[str, Command] = {
    "fit": _command(_trainer, "train, as a YAML file says", options_first=True),
    "validate": _command(_trainer, "measure on the validation split", options_first=True),
    "test": _command(_trainer, "measure on the test split", options_first=True),
    "predict": _command(_trainer, "predict", options_first=True),
    "plan": _command(_plan, "print what fit would adapt, and train nothing"),
    "export": _command(_merged_file, "write a checkpoint's merged network as a plain .safetensors file"),
    "merge": _command(_merged_file, "write a checkpoint with its adapter merged, for load_from_checkpoint"),
    "recipes": _command(_recipes, "list, show and copy the YAML files that are shipped"),
}


@contextmanager
def _given_arguments() -> Iterator[None]:
    """Lets LightningCLI run on arguments that it did not read from the process itself.

    Modules of the current folder can be named in `class_path`, as with `python -m`. Packages that import
    pytorch_lightning, whose classes the arguments may name, get those of lightning. What libraries say in every run is
    left out.
    """
    from lora_plugins.integrations.lightning.aliases import pytorch_lightning_aliased  # noqa: PLC0415

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with quiet(), pytorch_lightning_aliased():
        yield
