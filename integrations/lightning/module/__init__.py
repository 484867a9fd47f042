"""The LightningModule that is adapted: its target, adapters, tensors and names, and a merge that can be undone.

Depends on the core only.
"""

from lora_plugins.integrations.lightning.module.adapt import (
    add_adapter,
    check_not_nested,
    check_not_replaced,
    find_target,
    reuse_adapter,
)
from lora_plugins.integrations.lightning.module.bitwise import checksum, checksums, local
from lora_plugins.integrations.lightning.module.compiled_names import name_mapper, plain_name, rename_adapter
from lora_plugins.integrations.lightning.module.declarations import with_declarations
from lora_plugins.integrations.lightning.module.modes import (
    modes_of_frozen_norms,
    set_modes_of_frozen_norms,
    set_training_mode,
)
from lora_plugins.integrations.lightning.module.reversible_merge import (
    ReversibleMerge,
    check_mergeable,
    merge_reversibly,
    plain_state_dict,
    temporarily_merged,
    write_safetensors,
)
from lora_plugins.integrations.lightning.module.tensors import (
    adapted_targets,
    frozen_by_others,
    frozen_keys,
    frozen_tensors,
    layers_of_factors,
    state_of_adapters,
    trained_parameters,
)

__all__ = [
    "ReversibleMerge",
    "adapted_targets",
    "add_adapter",
    "check_mergeable",
    "check_not_nested",
    "check_not_replaced",
    "checksum",
    "checksums",
    "find_target",
    "frozen_by_others",
    "frozen_keys",
    "frozen_tensors",
    "layers_of_factors",
    "local",
    "merge_reversibly",
    "modes_of_frozen_norms",
    "name_mapper",
    "plain_name",
    "plain_state_dict",
    "rename_adapter",
    "reuse_adapter",
    "set_modes_of_frozen_norms",
    "set_training_mode",
    "state_of_adapters",
    "temporarily_merged",
    "trained_parameters",
    "with_declarations",
    "write_safetensors",
]
