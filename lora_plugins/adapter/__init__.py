"""The adapters of a model: their state, and the operations that change it.

`lifecycle` is the table of which call is allowed when. Data for inits that learn, mixed batches and combinations of
adapters are here too.
"""

from lora_plugins.adapter.acting import apply_state, base_in_place, freeze_new_norms
from lora_plugins.adapter.attach import adapter_parameters, adapter_tensors
from lora_plugins.adapter.blocks import without_adapters
from lora_plugins.adapter.calibration import Calibration, InitData, allocated, calibrate, calibration_for
from lora_plugins.adapter.combine import combine
from lora_plugins.adapter.content import (
    AdapterContent,
    NewAdapter,
    SlotTensors,
    factor_dtype,
    init_context,
    initialize,
)
from lora_plugins.adapter.elsewhere import check_here, check_not_fused, check_not_sharded
from lora_plugins.adapter.integrity import check_complete, check_in_place, check_norms
from lora_plugins.adapter.lifecycle import CALLS
from lora_plugins.adapter.mixed_batch import mixed_batch
from lora_plugins.adapter.moved_base import moved_base
from lora_plugins.adapter.new_bases import changed_bases, new_stored_weights, to_store
from lora_plugins.adapter.opening import check_not_nested, close_state
from lora_plugins.adapter.sharing import by_layer, check_shared
from lora_plugins.adapter.state import Adapter, ModelState, adapted_layers, model_state, present_state
from lora_plugins.adapter.swap import swap
from lora_plugins.adapter.transitions import (
    ADAPTER_NAME,
    add,
    check_names,
    check_new,
    check_not_owned,
    check_same,
    delete,
    set_active,
    unload,
)
from lora_plugins.adapter.unsaved import warn_of_unsaved
from lora_plugins.adapter.whole import leave_inference, whole

__all__ = [
    "ADAPTER_NAME",
    "CALLS",
    "Adapter",
    "AdapterContent",
    "Calibration",
    "InitData",
    "ModelState",
    "NewAdapter",
    "SlotTensors",
    "adapted_layers",
    "adapter_parameters",
    "adapter_tensors",
    "add",
    "allocated",
    "apply_state",
    "base_in_place",
    "by_layer",
    "calibrate",
    "calibration_for",
    "changed_bases",
    "check_complete",
    "check_here",
    "check_in_place",
    "check_names",
    "check_new",
    "check_norms",
    "check_not_fused",
    "check_not_nested",
    "check_not_owned",
    "check_not_sharded",
    "check_same",
    "check_shared",
    "close_state",
    "combine",
    "delete",
    "factor_dtype",
    "freeze_new_norms",
    "init_context",
    "initialize",
    "leave_inference",
    "mixed_batch",
    "model_state",
    "moved_base",
    "new_stored_weights",
    "present_state",
    "set_active",
    "swap",
    "to_store",
    "unload",
    "warn_of_unsaved",
    "whole",
    "without_adapters",
]
