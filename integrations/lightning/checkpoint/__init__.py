"""Small checkpoints: what Lightning writes without the frozen base, and how it is restored onto the base.

Depends on `module`. The format is described in `entry.py`.
"""

from lora_plugins.integrations.lightning.checkpoint.comparison import check_adapters
from lora_plugins.integrations.lightning.checkpoint.entry import KEY
from lora_plugins.integrations.lightning.checkpoint.late_layers import (
    left_out,
    missing_layers,
    present_base,
    put_base,
    with_present_base,
    without_base,
)
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
    "check_adapters",
    "check_whole",
    "left_out",
    "load_from_checkpoint",
    "loading_lines",
    "missing_layers",
    "original",
    "present_base",
    "put_base",
    "read_checkpoint",
    "reading_errors",
    "restore",
    "shrink",
    "state_key",
    "with_present_base",
    "without_base",
    "written_by",
]
