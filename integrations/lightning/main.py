"""The commands `lightning` and `lora-plugins`, and `python -m lora_plugins`."""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

from lora_plugins.cli.pipes import ending_quietly
from lora_plugins.errors import LoraError, PluginError, TargetError, near
from lora_plugins.plugins.discovery import DISTRIBUTION

TRACEBACK_VARIABLE = "LORA_PLUGINS_TRACEBACK"
"""Environment variable; if it is set, errors are shown with their traceback."""

_NEEDED = {"lightning": "lightning", "jsonargparse": "jsonargparse", "rich": "rich", "yaml": "jsonargparse"}


@ending_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: What follows the name of the program; by default those of the process.

    Returns:
        The exit code: 0, or 1 after an error that was printed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        print(f"error: this command needs {missing}. Run: pip install 'lora-plugins[lightning]'", file=sys.stderr)
        return 1
    except Exception as error:
        ours = _ours(error)
        if ours is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        _print_plugin_failure(ours)
        print(f"error: {ours}", file=sys.stderr)
        return 1


def _print_plugin_failure(error: LoraError) -> None:
    """Prints the traceback of a plugin that failed, where its absence is what the error is about."""
    if isinstance(error, PluginError | TargetError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
        print(file=sys.stderr)


def _ours(error: BaseException) -> LoraError | None:
    """Finds our error in a chain: jsonargparse raises one of its own from what a config's constructor raised."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, LoraError):
        found = found.__cause__ or found.__context__
    return found


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command in COMMANDS:
        return COMMANDS[command][0](arguments) or 0
    if command.startswith("-"):  # `--config FILE fit` and the like
        _trainer(arguments)
        return 0
    return _foreign(command)


def _trainer(arguments: list[str]) -> None:
    with _given_arguments():
        _module("cli.lora_cli").LoraCLI(args=arguments)


def _plan(arguments: list[str]) -> None:
    with _given_arguments():
        _module("cli.lora_cli").PlanCLI(args=["fit", *arguments[1:]])


def _file(arguments: list[str]) -> None:
    with _given_arguments():
        _module("cli.merged_files").run(arguments)


def _core(name: str) -> Callable[[list[str]], int]:
    """A command that needs the core only."""

    def run(arguments: list[str]) -> int:
        code: int = importlib.import_module(f"lora_plugins.cli.{name}").run(arguments[1:])
        return code

    return run


def _module(name: str) -> ModuleType:
    """Imports what a command needs when it is called: the overview has to work without it."""
    return importlib.import_module(f"lora_plugins.integrations.lightning.{name}")


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "fit": (_trainer, "train, as a YAML file says"),
    "validate": (_trainer, "measure on the validation split"),
    "test": (_trainer, "measure on the test split"),
    "predict": (_trainer, "predict"),
    "plan": (_plan, "print what fit would adapt, and train nothing"),
    "export": (_file, "write a checkpoint's merged network as a plain .safetensors file"),
    "merge": (_file, "write a checkpoint with its adapter merged, for load_from_checkpoint"),
    "plugins": (_core("plugins"), "list the installed plugins"),
    "doctor": (_core("doctor"), "check the installation, and say what to do"),
    "new-plugin": (_core("new_plugin"), "write a package with a plugin of your own to start from"),
}
"""Our commands: what runs them, given all arguments, and what they do."""


def _foreign(command: str) -> int:
    """Hands a command that is not ours to the other distribution that owns a script called `lightning`."""
    for point in metadata.entry_points(group="console_scripts", name="lightning"):
        if point.dist is not None and point.dist.name != DISTRIBUTION:
            result = point.load()()
            return result if isinstance(result, int) else 0
    print(
        f"error: there is no command {command!r}. {near(command, COMMANDS)} Other commands of the name `lightning` "
        "belong to the package lightning-sdk, which is not installed.",
        file=sys.stderr,
    )
    return 1


@contextmanager
def _given_arguments() -> Iterator[None]:
    """Runs LightningCLI on arguments that it did not read from the process itself.

    Modules of the current folder can be named in `class_path`, as with `python -m`. LightningCLI's warning that the
    process has arguments too is silenced: they are the same.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        yield


def _usage() -> str:
    lines = [f"  {name:11}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lora-plugins COMMAND [arguments]        (also: lightning COMMAND, python -m lora_plugins COMMAND)",
            "",
            *lines,
            "",
            "COMMAND --help shows the arguments of a command; fit --print_config prints a whole YAML file.",
        ]
    )
