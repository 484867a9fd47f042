"""Where the layers and values of a file are in a model, whichever of their names the file uses."""

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError, listing, near
from lora_plugins.files import check_root
from lora_plugins.formats.portable import PortableLayer
from lora_plugins.inplace import NamedModule, full_name, model_modules, own_buffers, own_parameters, persistent_buffers

Entry = TypeVar("Entry")


def places_by_name(model: nn.Module) -> dict[str, NamedModule]:
    """Returns where each module of a model is, by each of its names."""
    return {name: entry for entry in model_modules(model) for name in entry.names}


def check_placed(what: str, entries: Collection[str], names: Collection[str]) -> None:
    """Checks that the layers or values of an adapter, as messages call them, are among the names that a model has.

    Raises:
        AdapterFileError: If it lacks one.
    """
    unknown = [name for name in entries if name not in names]
    if not unknown:
        return
    check_root(entries, names)
    raise AdapterFileError(
        f"{len(unknown)} of {len(entries)} {what}s of the adapter are not in this model: {listing(unknown)}. "
        f"{near(unknown[0], names)} The adapter was made for another model, or for another part of one."
    )


def placed_layers(model: nn.Module, layers: Mapping[str, PortableLayer]) -> dict[str, PortableLayer]:
    """Returns layers by the first names that the model has for them.

    Raises:
        AdapterFileError: If the model lacks one, or two that differ are one layer of the model.
    """
    names = {name: entry.name for name, entry in places_by_name(model).items()}
    return _placed("layer", layers, names, _same_layer)


def placed_values(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns heads, biases and statistics by the first names that the model has for them.

    Raises:
        AdapterFileError: As `placed_layers` does.
    """
    return _placed("value", values, tensor_names(model), torch.equal)


def tensor_names(model: nn.Module) -> dict[str, str]:
    """Returns the first name of each parameter and buffer of a model by each of its names."""
    modules = model_modules(model)
    found: dict[str, str] = {}
    for kind, own in (("_parameters", own_parameters(modules)), ("_buffers", own_buffers(modules))):
        first = {id(tensor): name for name, tensor in own.items()}
        for entry in modules:
            for key, tensor in getattr(entry.module, kind).items():
                if tensor is not None:
                    found |= {full_name(name, key): first[id(tensor)] for name in entry.names}
    return found


def own_values(model: nn.Module) -> dict[str, Tensor]:
    """Returns what a state dict of the untouched model has, a tied tensor once."""
    modules = model_modules(model)
    tensors = {**own_parameters(modules), **persistent_buffers(modules)}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _placed(
    what: str, entries: Mapping[str, Entry], names: Mapping[str, str], same: Callable[[Entry, Entry], bool]
) -> dict[str, Entry]:
    check_placed(what, entries, names)
    placed: dict[str, tuple[str, Entry]] = {}
    for name, entry in entries.items():
        other, present = placed.setdefault(names[name], (name, entry))
        if other != name and not same(present, entry):
            raise AdapterFileError(
                f"In this model {name!r} and {other!r} are one and the same, and the adapter has different values for "
                "them."
            )
    return {first: entry for first, (_, entry) in placed.items()}


def _same_layer(first: PortableLayer, second: PortableLayer) -> bool:
    parts = ("A", "B", "magnitude", "bias")
    return first.alpha == second.alpha and all(_same(getattr(first, part), getattr(second, part)) for part in parts)


def _same(own: Tensor | None, other: Tensor | None) -> bool:
    return own is other if own is None or other is None else torch.equal(own, other)
