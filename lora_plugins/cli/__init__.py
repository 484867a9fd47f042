"""The command line: its program (`main.py`), the commands of the core, and the door by which others add commands.

The core's own commands, such as `plugins` and `convert`, need nothing but the core. Others come through
entry points of the group `lora_plugins.commands`, each of which names a table of `Command`s.
"""

from lora_plugins.cli.commands import INTERRUPTED, TERMINATED, Command, installed_commands
from lora_plugins.cli.parser import Parser
from lora_plugins.cli.pipes import exit_on_closed_output
from lora_plugins.cli.plain_warnings import plain_warnings
from lora_plugins.cli.starting import importing, signal_calls, without_collections

__all__ = [
    "INTERRUPTED",
    "TERMINATED",
    "Command",
    "Parser",
    "exit_on_closed_output",
    "importing",
    "installed_commands",
    "plain_warnings",
    "signal_calls",
    "without_collections",
]
