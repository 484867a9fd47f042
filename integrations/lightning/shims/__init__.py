"""Workarounds for what Lightning lacks: functions that stand in for methods, private parts, attributes without types.

Each private part is used in one file, which says what is lost without it. Depends on no other room.
"""

from lora_plugins.integrations.lightning.shims.average_model import Averaging, averaged_module, drop_average
from lora_plugins.integrations.lightning.shims.carried_state import carried, carry
from lora_plugins.integrations.lightning.shims.expected_warnings import expecting_eval_mode
from lora_plugins.integrations.lightning.shims.fit_data_source import train_loaders
from lora_plugins.integrations.lightning.shims.fsdp_state_dict import saves_shards
from lora_plugins.integrations.lightning.shims.methods import MethodShims
from lora_plugins.integrations.lightning.shims.multiprocessing_launcher import starts_by_multiprocessing
from lora_plugins.integrations.lightning.shims.nested_runs import begin_run, end_run
from lora_plugins.integrations.lightning.shims.untyped_attributes import callbacks_of, is_fast_dev_run

__all__ = [
    "Averaging",
    "MethodShims",
    "averaged_module",
    "begin_run",
    "callbacks_of",
    "carried",
    "carry",
    "drop_average",
    "end_run",
    "expecting_eval_mode",
    "is_fast_dev_run",
    "saves_shards",
    "starts_by_multiprocessing",
    "train_loaders",
]
