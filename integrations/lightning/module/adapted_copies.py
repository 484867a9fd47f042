"""What is done to copies of adapted networks, so that their adapters follow those of their origins."""

from collections.abc import Iterable, Iterator, Set

import torch
from torch import Tensor, nn

from lora_plugins.adapter import adapter_tensors
from lora_plugins.inplace import full_name, model_modules, named_parameters, own_parameters, submodule
from lora_plugins.integrations.lightning.module.adapted_parts import adapters_by_place, trained_in_place
from lora_plugins.integrations.lightning.module.network_copy import NetworkCopy
from lora_plugins.utils import plain_name


def is_adapted_alike(module: nn.Module, copy: NetworkCopy) -> bool:
    """Whether a copy has the parameters of its origin, adapters included, in the same order."""
    own, origin = (named_parameters(submodule(module, part)) for part in (copy.name, copy.origin))
    return list(own) == list(origin)


def start_alike(module: nn.Module, copies: Iterable[NetworkCopy], adapter: str) -> None:
    """Gives equal copies the same start of a new adapter as their origins.

    An average of B is one of the product `B @ A` only while A is the same. What an init made of the base is the same
    already, where the base is.
    """
    if derives_from_base(module, adapter):
        return
    for copy in copies:
        if copy.equal and is_adapted_alike(module, copy):
            copy_factors(module, copy, adapter)


def freeze_alike(module: nn.Module, copies: Iterable[NetworkCopy]) -> None:
    """Freezes the adapters of equal copies that their author froze: gradients do not train them."""
    for copy in copies:
        if not (copy.began_equal and copy.frozen and is_adapted_alike(module, copy)):
            continue
        shared = {id(parameter) for parameter in submodule(module, copy.origin).parameters()}
        for parameter in submodule(module, copy.name).parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)


def derives_from_base(module: nn.Module, adapter: str) -> bool:
    """Whether an init derived A and B of some adapters of a name from their base."""
    return any(each.plan.init.changes_base for (_, name), each in adapters_by_place(module).items() if name == adapter)


def copy_factors(module: nn.Module, copy: NetworkCopy, adapter: str, *, but: str | None = None) -> None:
    """Gives a copy that is adapted alike the A and B of its origin, except for the factor `but`, such as `lora_B`."""
    own, origin = (adapter_tensors(submodule(module, part)) for part in (copy.name, copy.origin))
    with torch.no_grad():
        for name, tensor in own.items():
            *_, factor, its_adapter = name.split(".")
            if its_adapter == adapter and factor != but:
                tensor.copy_(origin[name])


def add_names(module: nn.Module, copies: Iterable[NetworkCopy]) -> list[tuple[set[str], set[str]]]:
    """Adds the names of adapters to sets of the names of all parameters of a copy that is adapted alike.

    `ema_pytorch.EMA` makes such a set in its `__init__`, and averages what it names.

    Returns:
        The sets, and what was added to each.
    """
    added: list[tuple[set[str], set[str]]] = []
    values = [value for part in module.modules() for value in vars(part).values()]
    sets = [value for value in values if isinstance(value, set) and value]
    for copy in copies:
        if not is_adapted_alike(module, copy):
            continue
        network = submodule(module, copy.name)
        names, tensors = {name for name, _ in network.named_parameters()}, adapter_tensors(network)
        factors = {name for name in names if plain_name(name) in tensors}  # as they are called there
        own = names - factors
        for value in sets:
            if factors and value - factors == own:
                value.update(factors)
                added.append((value, factors))
    return added


def ids_in_place(module: nn.Module) -> set[int]:
    """Returns the `id` of each parameter that adapters train in place."""
    parameters = own_parameters(model_modules(module))
    return {id(parameters[name]) for name in trained_in_place(module) & parameters.keys()}


def base_pairs(module: nn.Module, copy: NetworkCopy, in_place: Set[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields what neither a copy nor its origin trains: the full name, the parameter, and that of the origin."""
    own, origin = (own_parameters(model_modules(submodule(module, p))) for p in (copy.name, copy.origin))
    for name, tensor in own.items():
        if in_place.isdisjoint((id(tensor), id(origin[name]))):
            yield full_name(copy.name, name), tensor, origin[name]
