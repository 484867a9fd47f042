"""Completes optimizers that were built before the adapters existed, and leaves all others alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.types import Optimizable
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import StateError
from lora_plugins.errors import counted, listing
from lora_plugins.field_checks import shown
from lora_plugins.inplace import layer_state
from lora_plugins.integrations.lightning.module import (
    find_copies,
    frozen_by_author,
    frozen_tensors,
    layers_of_factors,
    trained_parameters,
)
from lora_plugins.utils import within

_ADVICE = (
    "Build the optimizer in configure_optimizers, from the parameters that require a gradient: "
    "[p for p in self.parameters() if p.requires_grad]."
)

NAMES = "param_names"
"""The entry of a group that was made of `named_parameters()`: the names of its parameters, in their order."""


def flatten(configured: Any) -> Iterator[Any]:
    """Yields the optimizers, schedulers and other values of what `configure_optimizers` returned, in any form."""
    if isinstance(configured, Mapping):
        for value in configured.values():
            yield from flatten(value)
    elif isinstance(configured, list | tuple):
        for entry in configured:
            yield from flatten(entry)
    else:
        yield configured


def parameters_of(optimizers: Iterable[Optimizable]) -> set[int]:
    """Returns the `id` of each parameter that some optimizer holds."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def have_place(module: nn.Module, configured: Any) -> bool:
    """Returns whether optimizers have something of A and B, or a group of which it is clear that they belong there."""
    optimizers = _optimizers_of(configured)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    missing, layers = _missing(module, optimizers), layers_of_factors(module)
    return not _lack_factors(module, missing, layers) or bool(_clear_homes(missing, layers, groups))


def complete_optimizers(module: nn.Module, configured: Any) -> None:
    """Adds adapters to an optimizer that was built before they existed, in place, and warns.

    Such an optimizer, as the one that the stock LightningCLI makes of a YAML file, has no A and B at all. It gets those
    of the layers whose own tensors it has, in the group of the weight, or, if it has none of them and one group, all.
    Adding to a group keeps schedulers and their state valid. An optimizer with some adapters was built by somebody who
    chose them, so nothing is added.

    Raises:
        StateError: If there is no optimizer, or it is not clear where the missing tensors belong.
    """
    optimizers = _optimizers_of(configured)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    missing, layers = _missing(module, optimizers), layers_of_factors(module)
    if _lack_factors(module, missing, layers):
        if not optimizers:
            given = configured.get("optimizer", configured) if isinstance(configured, Mapping) else configured
            raise StateError(
                f"configure_optimizers returned no optimizer, but {shown(given)}, and {listing(missing, 3)} would "
                f"never move. {_ADVICE} Return it, as an object and not as its class or a partial."
            )
        missing = _add_to_groups(missing, layers, groups)
    if missing:
        teachers = [
            copy.name for copy in find_copies(module, parameters_of(optimizers)) if copy.frozen
        ]  # which the module moves by hand
        missing = {name: p for name, p in missing.items() if not within(name, teachers)}
    if missing:
        rank_zero_warn(
            f"{counted(len(missing), 'trainable tensor of adapters is', 'trainable tensors of adapters are')} in no "
            f"optimizer, which has others of them, and not trained: {listing(missing, 3)}. If that is meant, leave "
            f"their layers out with exclude_modules; else give them to the optimizer. {_ADVICE}"
        )
    _warn_of_idle(module, optimizers)


def _optimizers_of(configured: Any) -> list[Any]:
    """Returns what has parameter groups; wrappers need be no subclass of torch's Optimizer, which Lightning judges."""
    return [leaf for leaf in flatten(configured) if hasattr(leaf, "param_groups")]


def _missing(module: nn.Module, optimizers: Iterable[Optimizable]) -> dict[str, nn.Parameter]:
    held = parameters_of(optimizers)
    return {name: p for name, p in trained_parameters(module).items() if id(p) not in held}


def _lack_factors(module: nn.Module, missing: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module]) -> bool:
    """Returns whether all A and B that are trained are missing, of which there are some."""
    factors = trained_parameters(module).keys() & layers.keys()
    return bool(factors) and factors <= missing.keys()


def _add_to_groups(
    missing: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module], groups: list[dict[str, Any]]
) -> dict[str, nn.Parameter]:
    """Adds what belongs to the groups, A and B to that of the weight of their layer, and returns what does not."""
    homes = _clear_homes(missing, layers, groups)
    if not homes:
        raise StateError(
            f"{counted(len(missing), 'trainable tensor is', 'trainable tensors are')} in no optimizer and would never "
            f"move: {listing(missing)}. There are {len(groups)} parameter groups, so it is not clear where they "
            f"belong. {_ADVICE}"
        )
    for name, group in homes.items():
        group["params"].append(missing[name])
        if NAMES in group:
            group[NAMES].append(name)
    rank_zero_warn(
        f"The optimizer has nothing of the adapters, as it was built before them or of other parameters, and would "
        f"not train {listing(homes, 3)}. They were added to the group of the weight that they update, or to the only "
        f"one. {_ADVICE}"
    )
    return {name: p for name, p in missing.items() if name not in homes}


def _clear_homes(
    missing: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module], groups: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the group that what is missing belongs to, by name; empty if that is not clear."""
    homes = _homes({name: layers[name] for name in missing if name in layers}, groups)
    if not homes and len(groups) == 1:
        homes = dict.fromkeys(missing, groups)
    clear = all(len(found) == 1 for found in homes.values())
    return {name: group for name, (group,) in homes.items()} if clear else {}


def _homes(layers: Mapping[str, nn.Module], groups: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the groups that A and B may belong to, by name: those that have an adapted weight of the layer.

    Where they have other tensors of the layer alone, as the bias beside a weight that is stored, all may be meant.
    """
    contents = [{id(p) for p in group["params"]} for group in groups]
    homes = {}
    for name, layer in layers.items():
        weights = {id(p) for key, p in layer.named_parameters() if key in layer_state(layer).weight_names}
        found = [group for group, held in zip(groups, contents, strict=True) if held & weights]
        if found or any(held & {id(p) for p in layer.parameters()} for held in contents):
            homes[name] = found or groups
    return homes


def _warn_of_idle(module: nn.Module, optimizers: Iterable[Optimizable]) -> None:
    """Names what an optimizer trains without the adapter, and nothing of which is trained with it: a discriminator."""
    author = frozen_by_author(module)
    frozen = {id(tensor): name for name, tensor in frozen_tensors(module).items() if name not in author}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        idle = [frozen[id(p)] for p in held if id(p) in frozen]
        if idle and not any(p.requires_grad for p in held):
            rank_zero_warn(
                f"An optimizer ({type(optimizer).__name__}) has {counted(len(held), 'frozen tensor')} and no other, so "
                f"it trains nothing: {listing(idle, 3)}. If they are to be trained, as a discriminator or the weights "
                "of a loss beside an adapted network, list their modules in modules_to_save, or leave them out of "
                "`target`."
            )
