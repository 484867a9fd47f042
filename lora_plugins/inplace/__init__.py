"""An adapted layer in place: the user's own module, of a class that answers with the effective weight.

The names and modules of a model, frozen normalization layers, weights that something else computes, and those
that are stored in fewer bytes are here too.
"""

from lora_plugins.inplace.adapted_class import by_position, class_reason, positional_names, refresh_class
from lora_plugins.inplace.container import RESERVED, AdapterTensors
from lora_plugins.inplace.contents import Content, Contents
from lora_plugins.inplace.deltas import factors, own_tensors_of, slot_tensors, terms_of, variant_delta
from lora_plugins.inplace.described_tensor import TELLING
from lora_plugins.inplace.element_counts import element_count
from lora_plugins.inplace.frozen_norm import freeze, has_statistics, is_frozen, own_mode, set_own_mode, thaw
from lora_plugins.inplace.held_weights import is_of_torch
from lora_plugins.inplace.layer_state import STATE, LayerState, base_class_of, layer_state, state_of
from lora_plugins.inplace.library_kinds import foreign_kind
from lora_plugins.inplace.library_weights import (
    LibraryWeight,
    foreign_problem,
    foreign_weights,
    library_weights,
    pin_attributes,
    readable,
    unpin_attributes,
)
from lora_plugins.inplace.loading import factors_of, let_load, watch_loading
from lora_plugins.inplace.modules import (
    NamedModule,
    found_tensor,
    full_name,
    holder_of,
    model_modules,
    modules_by_name,
    named_parameters,
    named_tensors,
    of_all_modules,
    own_buffers,
    own_parameters,
    own_tensor,
    persistent_buffers,
    submodule,
    unwrapped,
)
from lora_plugins.inplace.normed import length_and_direction
from lora_plugins.inplace.parametrized import can_be_plain, recompute, remover
from lora_plugins.inplace.quantizer_marks import put_marks, quantizer_marks
from lora_plugins.inplace.row_modules import holders, mix_rows, unmix_rows
from lora_plugins.inplace.shards import is_shard
from lora_plugins.inplace.stored_weight import SUFFIX, StoredWeight, all_stored, stored_weight, stored_weights
from lora_plugins.inplace.storing import make_dense, put_stored
from lora_plugins.inplace.strip import strip_adapters
from lora_plugins.inplace.weights import (
    LostWeightError,
    detached_weight,
    frozen_statistics,
    held_in_eval_mode,
    weight_key,
)

__all__ = [
    "RESERVED",
    "STATE",
    "SUFFIX",
    "TELLING",
    "AdapterTensors",
    "Content",
    "Contents",
    "LayerState",
    "LibraryWeight",
    "LostWeightError",
    "NamedModule",
    "StoredWeight",
    "all_stored",
    "base_class_of",
    "by_position",
    "can_be_plain",
    "class_reason",
    "detached_weight",
    "element_count",
    "factors",
    "factors_of",
    "foreign_kind",
    "foreign_problem",
    "foreign_weights",
    "found_tensor",
    "freeze",
    "frozen_statistics",
    "full_name",
    "has_statistics",
    "held_in_eval_mode",
    "holder_of",
    "holders",
    "is_frozen",
    "is_of_torch",
    "is_shard",
    "layer_state",
    "length_and_direction",
    "let_load",
    "library_weights",
    "make_dense",
    "mix_rows",
    "model_modules",
    "modules_by_name",
    "named_parameters",
    "named_tensors",
    "of_all_modules",
    "own_buffers",
    "own_mode",
    "own_parameters",
    "own_tensor",
    "own_tensors_of",
    "persistent_buffers",
    "pin_attributes",
    "positional_names",
    "put_marks",
    "put_stored",
    "quantizer_marks",
    "readable",
    "recompute",
    "refresh_class",
    "remover",
    "set_own_mode",
    "slot_tensors",
    "state_of",
    "stored_weight",
    "stored_weights",
    "strip_adapters",
    "submodule",
    "terms_of",
    "thaw",
    "unmix_rows",
    "unpin_attributes",
    "unwrapped",
    "variant_delta",
    "watch_loading",
    "weight_key",
]
