"""Names without the traces of `torch.compile`, so that files of compiled and of eager modules interchange.

`self.net = torch.compile(self.net)` puts a module between: `net.0` is called `net._orig_mod.0` then. Files have the
name without it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_plugins.files.folder import PackedAdapter

_WRAPPED = "_orig_mod"

Rename = Callable[[str], str]


def plain_name(name: str) -> str:
    """Returns a name without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def names_in(module: nn.Module) -> Rename:
    """Returns what makes a plain name the one that it has in `module`, compiled parts considered."""
    wrappers = [name for name, _ in module.named_modules() if name.split(".")[-1] == _WRAPPED]
    # Outer wrappers come first, as named_modules gives them, and their inner ones are named with them.
    prefixes = [(name.removesuffix(_WRAPPED), f"{name}.") for name in wrappers]

    def rename(name: str) -> str:
        for before, after in prefixes:
            if name.startswith(before) and not name.startswith(after):
                name = after + name.removeprefix(before)
        return name

    return rename


def renamed(packed: PackedAdapter, rename: Rename) -> PackedAdapter:
    """Returns an adapter whose layers and tensors have other names.

    Args:
        packed: The adapter.
        rename: What makes a name the new one.
    """

    def tensor_key(key: str) -> str:  # lora/NAME/lora_A, recipe/NAME/PART/KEY, value/NAME
        kind, _, rest = key.partition("/")
        name, slash, tail = rest.partition("/")
        return f"{kind}/{rename(name)}{slash}{tail}"

    def keys(entries: Mapping[str, Any], change: Rename) -> dict[str, Any]:
        return {change(key): value for key, value in entries.items()}

    manifest = dict(packed.manifest)
    changes = {"layers": rename, "base": rename, "changed": rename, "tensors": tensor_key}
    manifest.update({key: keys(manifest[key], change) for key, change in changes.items() if key in manifest})
    return PackedAdapter(manifest, keys(packed.tensors, tensor_key))
