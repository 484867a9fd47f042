"""Our own adapter folder: a manifest and a safetensors file, written and read exactly.

Nothing is pickled, and nothing is half written.
"""

from lora_plugins.files.fingerprint import same
from lora_plugins.files.folder import read, write
from lora_plugins.files.manifest import MANIFEST
from lora_plugins.files.packed import PackedAdapter, pack, saved_name
from lora_plugins.files.unpacked import UnpackedAdapter, rebuilt_bases, unpack

__all__ = [
    "MANIFEST",
    "PackedAdapter",
    "UnpackedAdapter",
    "pack",
    "read",
    "rebuilt_bases",
    "same",
    "saved_name",
    "unpack",
    "write",
]
