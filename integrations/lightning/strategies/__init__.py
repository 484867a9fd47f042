"""Strategies of Lightning: which ones an adapter survives, and how checkpoints are saved and loaded through them.

Depends on `module`, `checkpoint` and `shims`.
"""

from lora_plugins.integrations.lightning.strategies.checkpoint_shims import CheckpointShims
from lora_plugins.integrations.lightning.strategies.rebuilt_layers import after_building, follow_building
from lora_plugins.integrations.lightning.strategies.sharded_checkpoint import gather_adapter
from lora_plugins.integrations.lightning.strategies.sharding import (
    AdaptBeforeSharding,
    check_not_wrapped,
    check_shardable,
    is_sharded,
    reshard,
    start_as_first,
    take_type_of_precision,
)
from lora_plugins.integrations.lightning.strategies.supported import (
    check_callbacks,
    check_strategy,
    check_trainer,
    warn_if_spawned,
)

__all__ = [
    "AdaptBeforeSharding",
    "CheckpointShims",
    "after_building",
    "check_callbacks",
    "check_not_wrapped",
    "check_shardable",
    "check_strategy",
    "check_trainer",
    "follow_building",
    "gather_adapter",
    "is_sharded",
    "reshard",
    "start_as_first",
    "take_type_of_precision",
    "warn_if_spawned",
]
