"""Finds copies that have modules of their origin in them, and others of their own, by the second names of modules."""

from collections.abc import Iterator, Mapping
from itertools import combinations

from torch import nn
from torch.nn.parameter import is_lazy

from lora_plugins.inplace import model_modules, own_parameters, submodule
from lora_plugins.integrations.lightning.module.bitwise import checksum
from lora_plugins.integrations.lightning.module.network_copy import NetworkCopy, are_repeated


def sharing_copies(module: nn.Module, required: Mapping[str, bool]) -> list[NetworkCopy]:
    """Returns these copies; `required` says which parameters required a gradient before there were adapters."""
    found: dict[str, NetworkCopy] = {}
    modules = model_modules(module)
    needed = {id(tensor): required[name] for name, tensor in own_parameters(modules).items()}
    pairs = (pair for entry in modules for names in combinations(entry.names, 2) for pair in _owners(*names))
    for first, second in dict.fromkeys(pairs):  # all layers of a part that has two names lead to one pair
        if second in found or are_repeated(module, first, second):
            continue
        copy = _sharing_copy(module, first, second, needed)
        if copy is not None:
            found[second] = copy
    return [*found.values()]


def _owners(first: str, second: str) -> Iterator[tuple[str, str]]:
    """Yields the pairs of parents of two names of one module, as long as it has the same name below them."""
    while True:
        (first, _, own), (second, _, other) = first.rpartition("."), second.rpartition(".")
        if own != other or not first or not second or first == second:
            return
        yield first, second


def _sharing_copy(module: nn.Module, first: str, second: str, needed: Mapping[int, bool]) -> NetworkCopy | None:
    """Returns the second part as a copy of the first, or the reverse if the author froze that of the first.

    `needed` says which parameters required a gradient before there were adapters, by `id`.
    """
    tensors = [own_parameters(model_modules(submodule(module, part))) for part in (first, second)]
    if any(is_lazy(tensor) for own in tensors for tensor in own.values()):
        return None
    layouts = [[(name, t.shape, t.dtype) for name, t in own.items()] for own in tensors]
    pairs = [(own, its) for own, its in zip(*(own.values() for own in tensors), strict=False) if own is not its]
    if layouts[0] != layouts[1] or not 0 < len(pairs) < len(layouts[0]):
        return None
    learns = [any(needed[id(pair[part])] for pair in pairs) for part in (0, 1)]
    if learns[1] and not learns[0]:
        first, second = second, first
    equal = all(checksum(own) == checksum(its) for own, its in pairs)
    return NetworkCopy(first, second, equal, equal, frozen=learns[0] != learns[1], shares=True)
