"""Our own adapter folder: a manifest and a safetensors file, written and read exactly.

Nothing is pickled, and nothing is half written.
"""

from lora_plugins.files.base_files import load_quantized
from lora_plugins.files.differences import by_same_plugins, differing_base, differing_config
from lora_plugins.files.fingerprint import checksum, fingerprint, fingerprints, same
from lora_plugins.files.folder import read, write
from lora_plugins.files.foreign_patterns import check_expressions
from lora_plugins.files.manifest import (
    OWN_ENTRIES,
    TENSOR_FILE,
    TENSOR_FILES,
    recipe_prefix,
    recipes,
    tensor_key,
    value_key,
)
from lora_plugins.files.not_finite import warn_of_not_finite
from lora_plugins.files.origins import versions_told
from lora_plugins.files.other_root import check_root
from lora_plugins.files.packed import manifest_of, pack, saved_name
from lora_plugins.files.recognized import PICKLED, format_of, options_of
from lora_plugins.files.stored_base import described
from lora_plugins.files.tensor_bytes import is_brought_back
from lora_plugins.files.unpacked import planned_again, rebuilt_bases, unpack
from lora_plugins.names import MANIFEST
from lora_plugins.plugins import PackedAdapter

__all__ = [
    "MANIFEST",
    "OWN_ENTRIES",
    "PICKLED",
    "TENSOR_FILE",
    "TENSOR_FILES",
    "PackedAdapter",
    "by_same_plugins",
    "check_expressions",
    "check_root",
    "checksum",
    "described",
    "differing_base",
    "differing_config",
    "fingerprint",
    "fingerprints",
    "format_of",
    "is_brought_back",
    "load_quantized",
    "manifest_of",
    "options_of",
    "pack",
    "planned_again",
    "read",
    "rebuilt_bases",
    "recipe_prefix",
    "recipes",
    "same",
    "saved_name",
    "tensor_key",
    "unpack",
    "value_key",
    "versions_told",
    "warn_of_not_finite",
    "write",
]
