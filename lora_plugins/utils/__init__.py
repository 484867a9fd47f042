"""Small tools that know nothing of LoRA: autocast, quantizers, random numbers, versions, files.

Every other room may use them.
"""

from lora_plugins.utils.atomic_file import (
    folder_beside,
    put_files,
    read_unmixed,
    remove_leftovers,
    replace_file,
    replace_files,
    replace_torch_file,
    take_permissions,
)
from lora_plugins.utils.autocast import autocast_dtype, in_full
from lora_plugins.utils.collection import without_collection
from lora_plugins.utils.constants import on_device
from lora_plugins.utils.ending import ending
from lora_plugins.utils.inference import outside_inference
from lora_plugins.utils.low_rank import low_rank, truncated_svd
from lora_plugins.utils.memory_format import laid_out_like
from lora_plugins.utils.paths import path_ends, path_runs, path_starts, within
from lora_plugins.utils.plain_names import COMPILED, INSERTED, loaded_key, plain_name
from lora_plugins.utils.precision import are_finite, common_type, in_float64, single_at_least
from lora_plugins.utils.quantize import BITS, blocks_of, levels, nearest_levels, quantize_dequantize
from lora_plugins.utils.randomness import own_randomness, random_module, run_seed, seeded
from lora_plugins.utils.regular_file import check_regular
from lora_plugins.utils.saved_tensors import KeptTensor, saved_tensors_take_hooks, without_hooks_of_others
from lora_plugins.utils.shapes import is_dense, shape_or_value
from lora_plugins.utils.transforms import transforms_are_active
from lora_plugins.utils.versions import Versions, mark_restored, mark_stand_ins, put_value, version

__all__ = [
    "BITS",
    "COMPILED",
    "INSERTED",
    "KeptTensor",
    "Versions",
    "are_finite",
    "autocast_dtype",
    "blocks_of",
    "check_regular",
    "common_type",
    "ending",
    "folder_beside",
    "in_float64",
    "in_full",
    "is_dense",
    "laid_out_like",
    "levels",
    "loaded_key",
    "low_rank",
    "mark_restored",
    "mark_stand_ins",
    "nearest_levels",
    "on_device",
    "outside_inference",
    "own_randomness",
    "path_ends",
    "path_runs",
    "path_starts",
    "plain_name",
    "put_files",
    "put_value",
    "quantize_dequantize",
    "random_module",
    "read_unmixed",
    "remove_leftovers",
    "replace_file",
    "replace_files",
    "replace_torch_file",
    "run_seed",
    "saved_tensors_take_hooks",
    "seeded",
    "shape_or_value",
    "single_at_least",
    "take_permissions",
    "transforms_are_active",
    "truncated_svd",
    "version",
    "within",
    "without_collection",
    "without_hooks_of_others",
]
