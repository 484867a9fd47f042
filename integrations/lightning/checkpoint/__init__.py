"""Small checkpoints: what Lightning writes without the frozen base, and how it is restored onto the base.

Depends on `module`. The format is described in `entry.py`.
"""

from lora_plugins.integrations.lightning.checkpoint.comparison import check_adapters
from lora_plugins.integrations.lightning.checkpoint.entry import KEY
from lora_plugins.integrations.lightning.checkpoint.late_layers import before_hook, missing_layers, without_base
from lora_plugins.integrations.lightning.checkpoint.objects import Global, allowed
from lora_plugins.integrations.lightning.checkpoint.reading import check_whole, read_checkpoint, reading_errors
from lora_plugins.integrations.lightning.checkpoint.rebuilding import loading_lines, original
from lora_plugins.integrations.lightning.checkpoint.restoring import restore
from lora_plugins.integrations.lightning.checkpoint.shrinking import shrink
from lora_plugins.integrations.lightning.checkpoint.state_dicts import state_key
from lora_plugins.integrations.lightning.checkpoint.without_trainer import LoraCheckpointMixin, load_from_checkpoint
from lora_plugins.integrations.lightning.checkpoint.written_checkpoints import written_by

__all__ = [
    "KEY",
    "Global",
    "LoraCheckpointMixin",
    "allowed",
    "before_hook",
    "check_adapters",
    "check_whole",
    "load_from_checkpoint",
    "loading_lines",
    "missing_layers",
    "original",
    "read_checkpoint",
    "reading_errors",
    "restore",
    "shrink",
    "state_key",
    "without_base",
    "written_by",
]
