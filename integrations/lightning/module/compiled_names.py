"""Names without the prefix of `torch.compile`, so that files of compiled and of eager modules are interchangeable.

`self.net = torch.compile(self.net)` inserts a module: `net.0` is then called `net._orig_mod.0`. Files have the plain
name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_plugins.files import PackedAdapter
from lora_plugins.utils import COMPILED

Rename = Callable[[str], str]


def name_mapper(module: nn.Module) -> Rename:
    """Returns a function from a plain name to the name in `module`, some of whose parts may be compiled."""
    wrappers = [name for name, _ in module.named_modules() if name.split(".")[-1] == COMPILED]
    # named_modules gives outer wrappers first, and the names of inner ones contain them.
    prefixes = [(name.removesuffix(COMPILED), f"{name}.") for name in wrappers]

    def rename(name: str) -> str:
        for before, after in prefixes:
            if name.startswith(before) and not name.startswith(after):
                name = after + name.removeprefix(before)
        return name

    return rename


def rename_adapter(packed: PackedAdapter, rename: Rename) -> PackedAdapter:
    """Returns an adapter whose layers and tensors have other names.

    Args:
        packed: The adapter.
        rename: Maps a present name to the new one.
    """

    def tensor_key(key: str) -> str:  # lora/NAME/lora_A, recipe/NAME/PART/KEY, value/NAME
        kind, _, rest = key.partition("/")
        name, slash, tail = rest.partition("/")
        return f"{kind}/{rename(name)}{slash}{tail}"

    def keys(entries: Mapping[str, Any], change: Rename) -> dict[str, Any]:
        return {change(key): value for key, value in entries.items()}

    manifest = dict(packed.manifest)
    changes = {"layers": rename, "base": rename, "changed": rename, "stored": rename, "tensors": tensor_key}
    manifest.update({key: keys(manifest[key], change) for key, change in changes.items() if key in manifest})
    return PackedAdapter(manifest, keys(packed.tensors, tensor_key))
