"""Weights that several layers share: no change may reach a layer that is not adapted."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lora_plugins.errors import MergeError
from lora_plugins.inplace import full_name, model_modules, stored_weights, submodule, weight_key

_REMEDIES: Mapping[str, str] = {
    "adapt": "Target that too, if it is of a layer that a plugin adapts; or add {layer!r} to exclude_modules, or untie "
    "the two.",
    "store": "Name both in quantize_modules, if both are of layers that plugins adapt; or name neither, or untie the "
    "two.",
}
"""By what is done to a weight, what helps where another layer shares it."""


def check_shared(model: nn.Module, weights: Mapping[str, Collection[str]], *, to: str = "adapt") -> None:
    """Checks that no other layer uses weights that are about to change, given as attribute names by layer name.

    The message says whether they change to `adapt` them, or to `store` them in fewer bytes.

    Raises:
        MergeError: If one of them is also a weight that is not among them, naming both.
    """
    changing = {
        key: full_name(layer, tensor)
        for layer, tensors in weights.items()
        for tensor in tensors
        if (key := weight_key(submodule(model, layer), tensor)) is not None
    }
    for entry in model_modules(model):
        for own in (*entry.module._parameters.keys(), *stored_weights(entry.module)):
            key = weight_key(entry.module, own)
            if key in changing and own not in weights.get(entry.name, ()):
                raise MergeError(
                    f"{changing[key]!r} is the same tensor as {full_name(entry.name, own)!r}, which the adapter does "
                    f"not {to} and which would change with it. "
                    + _REMEDIES[to].format(layer=changing[key].rpartition(".")[0])
                )


def by_layer(weights: Iterable[str]) -> dict[str, set[str]]:
    """Returns attribute names of weights by layer name, from their full names."""
    found: dict[str, set[str]] = {}
    for name in weights:
        layer, _, tensor = name.rpartition(".")
        found.setdefault(layer, set()).add(tensor)
    return found
