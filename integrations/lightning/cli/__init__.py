"""The commands of Lightning: `fit`, `validate`, `test`, `predict`, `plan`, `export` and `merge`.

What needs Lightning is imported when it is used, so that the overview of all commands works where it is missing.
"""

from typing import TYPE_CHECKING

from lora_plugins.integrations.lightning.cli.command_table import COMMANDS
from lora_plugins.integrations.lightning.cli.merged_file_parser import MAX_ERROR
from lora_plugins.integrations.lightning.cli.noise import quiet
from lora_plugins.integrations.lightning.cli.short_flags import SHORT, nonempty, place, positive, share, whole
from lora_plugins.lazy import lazily

if TYPE_CHECKING:
    from lora_plugins.integrations.lightning.cli.held_places import try_lock, unlock
    from lora_plugins.integrations.lightning.cli.lora_cli import LoraCLI
    from lora_plugins.integrations.lightning.cli.merged_files import export_checkpoint, merge_checkpoint
    from lora_plugins.integrations.lightning.cli.recipes import recipe_path

__all__ = [
    "COMMANDS",
    "MAX_ERROR",
    "SHORT",
    "LoraCLI",
    "export_checkpoint",
    "merge_checkpoint",
    "nonempty",
    "place",
    "positive",
    "quiet",
    "recipe_path",
    "share",
    "try_lock",
    "unlock",
    "whole",
]

_MODULES = {
    "LoraCLI": "lora_cli",
    "export_checkpoint": "merged_files",
    "merge_checkpoint": "merged_files",
    "recipe_path": "recipes",
    "try_lock": "held_places",
    "unlock": "held_places",
}

__getattr__, __dir__ = lazily(__name__, _MODULES, extra="lightning")
