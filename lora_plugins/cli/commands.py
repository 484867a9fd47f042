"""What a command is, and which commands are installed."""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from lora_plugins.cli.command_lines import PARSERS
from lora_plugins.names import DISTRIBUTION

GROUP = "lora_plugins.commands"
"""Entry-point group for further commands. An entry point names a `Mapping[str, Command]`, by the commands' names."""


INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""

TERMINATED = 143
"""Likewise of one that SIGTERM ended, as `kill` and schedulers send it."""


@dataclass(frozen=True)
class Command:
    """One command of the program.

    The table that holds it is imported for the overview, so what takes long to import, or may be missing, is imported
    by `run`.

    Args:
        summary: What it does, for the overview.
        run: Runs it: takes all arguments of the program, the command's name included, and returns the exit code.
        needs: Import names of the packages that `run` imports and that may be missing.
        requirement: What pip installs to have them, such as `lora-plugins[lightning]`.
        options_first: Whether options may come before its name, as in `--config FILE fit`.
    """

    summary: str
    run: Callable[[list[str]], int]
    needs: Collection[str] = ()
    requirement: str = ""
    options_first: bool = False


@dataclass(frozen=True)
class Commands:
    """All commands that are installed.

    Args:
        table: The commands by name, in the order of the overview.
        problems: A sentence for each table that cannot be loaded, and for each command that is left out because
            another one has its name.
    """

    table: Mapping[str, Command]
    problems: tuple[str, ...]


def _of_the_core(module: str) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        given = PARSERS[arguments[0]]().parse_args(arguments[1:])  # before torch is imported
        code: int = importlib.import_module(f"lora_plugins.cli.{module}").run(given)
        return code

    return run


CORE_COMMANDS: Mapping[str, Command] = {
    "inspect": Command("show what is in an adapter file of any format", _of_the_core("inspect_adapter")),
    "convert": Command("write an adapter in another format", _of_the_core("convert_adapter")),
    "plugins": Command("list the installed plugins", _of_the_core("plugins")),
    "doctor": Command("check the installation, and say what to do", _of_the_core("doctor")),
    "new-plugin": Command("write a package with a plugin of your own to start from", _of_the_core("new_plugin")),
}
"""The commands that need nothing but the core."""


def installed_commands() -> Commands:
    """Returns the commands of all entry points, then those of the core; an earlier owner of a name keeps it."""
    owners = dict.fromkeys(CORE_COMMANDS, DISTRIBUTION)
    table: dict[str, Command] = {}
    problems: list[str] = []
    for point in _entry_points():
        owner = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
        try:
            found = dict(_checked(point.load()))
        # Whatever a stranger's module raises must not stop the other commands; sys.exit() is how some end an import.
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(f"The commands {point.name!r} of {owner} cannot be loaded: {reason}")
            continue
        for name, command in found.items():
            if name in owners:
                problems.append(f"The command {name!r} of {owner} is left out: {owners[name]} has one of that name.")
            else:
                table[name], owners[name] = command, owner
    return Commands({**table, **CORE_COMMANDS}, tuple(problems))


def _entry_points() -> Iterator[metadata.EntryPoint]:
    """Yields the entry points, our own first."""

    def order(point: metadata.EntryPoint) -> tuple[bool, str, str]:
        distribution = point.dist.name if point.dist else ""
        return distribution != DISTRIBUTION, distribution, point.name

    yield from sorted(metadata.entry_points(group=GROUP), key=order)


def _checked(table: object) -> Mapping[str, Command]:
    if not isinstance(table, Mapping) or not all(isinstance(command, Command) for command in table.values()):
        raise TypeError("it is not a mapping of names to lora_plugins.cli.Command")
    return table
