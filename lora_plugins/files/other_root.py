"""Adapters of a model that holds the given one, or that the given one holds: all names differ by the same prefix."""

from collections.abc import Collection

from lora_plugins.errors import AdapterFileError
from lora_plugins.utils import path_starts


def check_root(layers: Collection[str], names: Collection[str]) -> None:
    """Checks that an adapter was not made for a part of the model, or for a larger one, by names of layers and modules.

    Raises:
        AdapterFileError: If all layers are in the model under a longer or a shorter name, and none under its own.
    """
    if not layers or any(layer in names for layer in layers):
        return
    first = min(layers, key=len)
    for above in reversed(path_starts(first)[1:]):
        if all(layer.startswith(f"{above}.") and layer.removeprefix(f"{above}.") in names for layer in layers):
            raise AdapterFileError(
                f"The adapter is one of a model that holds this one as {above!r}: its layers are called {first!r} and "
                f"the like, and {first.removeprefix(f'{above}.')!r} here. Load it onto that model."
            )
    ends = [name.removesuffix(f".{first}") for name in names if name.endswith(f".{first}")]
    for below in sorted(ends, key=len):
        if all(f"{below}.{layer}" in names for layer in layers):
            raise AdapterFileError(
                f"The adapter is one of a part of this model, {below!r}: its layers are called {first!r} and the like, "
                f"and {f'{below}.{first}'!r} here. Load it onto that part: LoraModel.load_adapter("
                f"model.get_submodule({below!r}), path)."
            )
