"""The LightningModule that is adapted: its target, adapters, tensors and names, and a merge that can be undone.

Depends on the core only.
"""

from lora_plugins.integrations.lightning.module.adapt import (
    add_adapter,
    check_not_nested,
    check_not_replaced,
    find_target,
    lost_layers,
    reuse_adapter,
    warn_of_others,
)
from lora_plugins.integrations.lightning.module.adapted_copies import (
    add_names,
    base_pairs,
    copy_factors,
    derives_from_base,
    freeze_alike,
    ids_in_place,
    is_adapted_alike,
    start_alike,
)
from lora_plugins.integrations.lightning.module.adapted_parts import (
    adapted_targets,
    adapted_weights,
    adapters_by_place,
    layers_of_factors,
)
from lora_plugins.integrations.lightning.module.bitwise import checksum, checksums, equal, local
from lora_plugins.integrations.lightning.module.built_layers import BUILDING_HOOKS, with_built_layers
from lora_plugins.integrations.lightning.module.carried_merge import merge_as_bytes, merge_from_bytes
from lora_plugins.integrations.lightning.module.compiled_names import name_mapper
from lora_plugins.integrations.lightning.module.copies import find_copies
from lora_plugins.integrations.lightning.module.copies_of_weights import kept_copies
from lora_plugins.integrations.lightning.module.declarations import file_entries, with_declarations
from lora_plugins.integrations.lightning.module.frozen_parts import (
    built_alike,
    frozen_as_built,
    not_as_built,
    note_built,
    outside,
)
from lora_plugins.integrations.lightning.module.kept_merge import KeptMerge
from lora_plugins.integrations.lightning.module.merged_base import (
    check_merged_base,
    mark_merged,
    merged_weights,
)
from lora_plugins.integrations.lightning.module.modes import (
    modes_of_frozen_norms,
    set_modes_of_frozen_norms,
    set_training_mode,
)
from lora_plugins.integrations.lightning.module.moved_tensors import (
    KnownBases,
    adapted_layers_moved,
    known_bases,
    mark_moved,
    moved_by_hand,
    put_back_known_bases,
    take_fingerprints,
)
from lora_plugins.integrations.lightning.module.network_copy import NetworkCopy
from lora_plugins.integrations.lightning.module.plain_file import (
    checked_state_dict,
    plain_state_dict,
    whole_state_dict,
    write_safetensors,
)
from lora_plugins.integrations.lightning.module.reversible_merge import (
    check_mergeable,
    merge_reversibly,
    temporarily_merged,
)
from lora_plugins.integrations.lightning.module.start import Start
from lora_plugins.integrations.lightning.module.tensors import (
    built_since,
    built_too_late,
    frozen_by_author,
    frozen_by_others,
    frozen_keys,
    frozen_tensors,
    tensors_beside_merges,
    trained_parameters,
)

__all__ = [
    "BUILDING_HOOKS",
    "KeptMerge",
    "KnownBases",
    "NetworkCopy",
    "Start",
    "adapted_layers_moved",
    "adapted_targets",
    "adapted_weights",
    "adapters_by_place",
    "add_adapter",
    "add_names",
    "base_pairs",
    "built_alike",
    "built_since",
    "built_too_late",
    "check_mergeable",
    "check_merged_base",
    "check_not_nested",
    "check_not_replaced",
    "checked_state_dict",
    "checksum",
    "checksums",
    "copy_factors",
    "derives_from_base",
    "equal",
    "file_entries",
    "find_copies",
    "find_target",
    "freeze_alike",
    "frozen_as_built",
    "frozen_by_author",
    "frozen_by_others",
    "frozen_keys",
    "frozen_tensors",
    "ids_in_place",
    "is_adapted_alike",
    "kept_copies",
    "known_bases",
    "layers_of_factors",
    "local",
    "lost_layers",
    "mark_merged",
    "mark_moved",
    "merge_as_bytes",
    "merge_from_bytes",
    "merge_reversibly",
    "merged_weights",
    "modes_of_frozen_norms",
    "moved_by_hand",
    "name_mapper",
    "not_as_built",
    "note_built",
    "outside",
    "plain_state_dict",
    "put_back_known_bases",
    "reuse_adapter",
    "set_modes_of_frozen_norms",
    "set_training_mode",
    "start_alike",
    "take_fingerprints",
    "temporarily_merged",
    "tensors_beside_merges",
    "trained_parameters",
    "warn_of_others",
    "whole_state_dict",
    "with_built_layers",
    "with_declarations",
    "write_safetensors",
]
