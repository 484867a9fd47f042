"""The program: the scripts `lora-plugins` and `lightning`, and `python -m lora_plugins`."""

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from lora_plugins.cli.commands import CORE_COMMANDS, INTERRUPTED, Command, installed_commands
from lora_plugins.cli.pipes import exit_on_closed_output, print_any_text
from lora_plugins.cli.plain_warnings import plain_warnings
from lora_plugins.cli.starting import keep_freed_memory, share_processors, stopping_at_sigterm
from lora_plugins.errors import LoraError, PluginError, TargetError, near
from lora_plugins.names import DISTRIBUTION, TRACEBACK_VARIABLE

NO_ROOM = "Make room, or name a place on another disk."
NO_RIGHTS = "Name another place, or ask for the right to it."
OF_PLACES: Mapping[int, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), NO_ROOM),  # a full disk or quota, too large a file
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), NO_RIGHTS),
    errno.ENAMETOOLONG: "Name a shorter one.",
}
"""Errors of the system that are no fault of the program's: what to do."""

CALLED: Mapping[str, str] = {
    **dict.fromkeys(("finetune", "fine-tune", "tune"), "train"),
    **dict.fromkeys(("infer", "inference", "classify", "segment"), "predict"),
    **dict.fromkeys(("eval", "evaluate", "val"), "validate"),
    "compare": "report compare",
    "version": "--version",
}
"""What commands of other programs are called here, where spelling alone would offer something else."""

OF_OTHERS = "lightning"
"""The name of the program that another package has as well."""


@exit_on_closed_output
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: What follows the name of the program; by default those of the process.

    Returns:
        The exit code: 0, 1 after an error that was printed, or 130 where Ctrl-C ended it.

    Raises:
        SystemExit: After SIGTERM, with the code of shells, 143, which is told.
    """
    print_any_text()
    share_processors()
    keep_freed_memory()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stopping_at_sigterm():
            return _dispatch(given)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        ours = _lora_error(error)
        message = _of_place(error) if ours is None else str(ours)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        if ours is not None:
            _print_plugin_failure(ours)
        return _fail("\n".join([message, *getattr(ours or error, "__notes__", ())]))


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:  # as of other programs: `help train` is `train --help`
        arguments = [*arguments[1:2], "--help"]
    name = arguments[0] if arguments else "--help"
    if name in CORE_COMMANDS:
        return _run(CORE_COMMANDS[name], arguments)
    if name == "--version":
        print(f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}")
        return 0
    commands = installed_commands()
    if name in ("-h", "--help"):
        print(_overview(commands.table))
        _print_problems(commands.problems)
        return 0
    command = _after_options(arguments, commands.table) if name.startswith("-") else commands.table.get(name)
    if command is not None:
        return _run(command, arguments)
    code = _run_foreign()
    if code is not None:
        return code
    _print_problems(commands.problems)
    others = (
        " Other commands of the name `lightning` belong to the package lightning-sdk, which is not installed."
        if Path(sys.argv[0]).stem == OF_OTHERS
        else ""
    )
    called = CALLED.get(name, "")
    known = called.startswith("-") or called.partition(" ")[0] in commands.table
    hint = f"It is {called!r} here." if known else near(name, commands.table)
    return _fail(f"there is no command {name!r}. {hint}{others}")


def _run(command: Command, arguments: list[str]) -> int:
    try:
        with plain_warnings():
            return command.run(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in command.needs:
            raise
        return _fail(f"this command needs {missing}. Run: pip install '{command.requirement}'")


def _run_foreign() -> int | None:
    """Runs the script `lightning` of another distribution, such as lightning-sdk; returns its exit code, None without.

    Two distributions may install a script of one name, and the one that was installed last has the file. If that is
    ours, it hands over the commands that it does not know.
    """
    for point in metadata.entry_points(group="console_scripts", name=OF_OTHERS):
        if point.dist is not None and point.dist.name != DISTRIBUTION:
            result = point.load()()
            return result if isinstance(result, int) else 0
    return None


def _after_options(arguments: list[str], commands: Mapping[str, Command]) -> Command | None:
    """Returns the command that an option precedes: the one that is named, or the first that takes options first."""
    able = {name: command for name, command in commands.items() if command.options_first}
    named = [able[argument] for argument in arguments if argument in able]
    return next(iter([*named, *able.values()]), None)


def _overview(commands: Mapping[str, Command]) -> str:
    lines = [f"  {name:11}{command.summary}" for name, command in commands.items()]
    return "\n".join(
        [
            "usage: lora-plugins COMMAND [arguments]        (also: lightning COMMAND, python -m lora_plugins COMMAND)",
            "",
            *lines,
            "",
            "COMMAND --help shows the arguments of a command; fit --print_config prints a whole YAML file.",
        ]
    )


def _lora_error(error: BaseException) -> LoraError | None:
    """Returns our error in a chain of causes: jsonargparse raises another from what a config's constructor raised.

    One that was merely being handled when another came up is not what ended the command.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, LoraError):
        found = found.__cause__
    return found


def _of_place(error: Exception) -> str | None:
    """Returns why the system cannot use a path, and what to do; None for other errors."""
    if not isinstance(error, OSError) or error.errno is None or error.errno not in OF_PLACES:
        return None
    advice = OF_PLACES[error.errno]
    place = error.filename2 or error.filename  # of a file that is moved, the first is where it was
    if not place and advice != NO_ROOM:  # of a port, or a device
        return None
    return f"{os.strerror(error.errno)}{f' for {place}' if place else ''}. {advice}"


def _print_plugin_failure(error: LoraError) -> None:
    """Prints the traceback of a plugin that failed, where its absence is what the error is about."""
    cause = error.__cause__
    if isinstance(error, PluginError | TargetError) and cause is not None and not isinstance(cause, LoraError):
        traceback.print_exception(cause)
        print(file=sys.stderr)


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1
