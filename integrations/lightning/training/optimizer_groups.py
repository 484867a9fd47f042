"""Completes optimizers that were built before the adapters existed, and leaves all others alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.types import Optimizable
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lora_plugins import StateError
from lora_plugins.errors import listing
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

_NOTES = {
    # What optimizers of torch say of a tensor that is computed.
    "non-leaf Tensor": (
        "The weight of an adapted layer, as in AdamW([self.head.weight]), is computed from the base and the adapter. "
        "Give the optimizer self.head.parameters(), or name the layer in modules_to_save to train it in full."
    ),
    # What code that comes from minGPT asserts.
    "were not separated into either decay": (
        "A configure_optimizers that sorts parameters by the class of their layer does not know A and B: let it put "
        "names that contain 'lora_' into a group, in a subclass of the module if it is not yours."
    ),
}
"""What may have caused an error of `configure_optimizers`, by words of it."""

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


def explain_groups(error: BaseException) -> None:
    """Adds to an error of `configure_optimizers` what adapters have to do with it."""
    for words, note in _NOTES.items():
        if words in str(error):
            error.add_note(note)


def complete_optimizers(module: nn.Module, configured: Any) -> None:
    """Adds adapters to an optimizer that was built before they existed, in place, and warns.

    Such an optimizer, as the one that the stock LightningCLI makes of a YAML file, has no A and B at all. It gets those
    of the layers whose own tensors it has, or, if it has none of them, all. Adding to its group keeps schedulers and
    their state valid. An optimizer with some adapters was built by somebody who chose them, so nothing is added.

    Args:
        module: The adapted module.
        configured: What its `configure_optimizers` returned.

    Raises:
        StateError: If it is not clear where the missing tensors belong.
    """
    # Wrappers of an optimizer need be no subclass of torch's; whether it takes one is for Lightning to say.
    optimizers = [leaf for leaf in flatten(configured) if hasattr(leaf, "param_groups")]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained, held = trained_parameters(module), parameters_of(optimizers)
    missing = {name: p for name, p in trained.items() if id(p) not in held}
    factors = trained.keys() & layers_of_factors(module).keys()
    if missing and factors and factors <= missing.keys():
        missing = _add_to_group(missing, module, groups)
    if missing:
        teachers = [copy.name for copy in find_copies(module, held) if copy.frozen]  # which the module moves by hand
        missing = {name: p for name, p in missing.items() if not within(name, teachers)}
    if missing:
        rank_zero_warn(
            f"{len(missing)} trainable tensors of adapters are in no optimizer, which has others of them, so they are "
            f"not trained: {listing(missing, 3)}. If that is meant, leave their layers out with exclude_modules; else "
            f"give them to the optimizer. {_ADVICE}"
        )
    _warn_of_idle(module, optimizers)


def _add_to_group(
    missing: Mapping[str, nn.Parameter], module: nn.Module, groups: list[dict[str, Any]]
) -> dict[str, nn.Parameter]:
    """Adds what belongs to the only parameter group, and returns what does not."""
    if len(groups) != 1:
        raise StateError(
            f"{len(missing)} trainable tensors are in no optimizer and would never move: {listing(missing)}. There are "
            f"{len(groups)} parameter groups, so it is not clear where they belong. {_ADVICE}"
        )
    held, layers = {id(p) for p in groups[0]["params"]}, layers_of_factors(module)
    chosen = {name for name in missing if name in layers and held & {id(p) for p in layers[name].parameters()}}
    added = {name: p for name, p in missing.items() if name in chosen or not chosen}
    groups[0]["params"].extend(added.values())
    if NAMES in groups[0]:
        groups[0][NAMES].extend(added)
    rank_zero_warn(
        f"The optimizer has nothing of the adapters, as it was built before them or of other parameters, and would "
        f"not train {listing(added, 3)}. They were added to its parameter group now. {_ADVICE}"
    )
    return {name: p for name, p in missing.items() if name not in added}


def _warn_of_idle(module: nn.Module, optimizers: Iterable[Optimizable]) -> None:
    """Names what an optimizer trains without the adapter, and nothing of which is trained with it: a discriminator."""
    author = frozen_by_author(module)
    frozen = {id(tensor): name for name, tensor in frozen_tensors(module).items() if name not in author}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        idle = [frozen[id(p)] for p in held if id(p) in frozen]
        if idle and not any(p.requires_grad for p in held):
            rank_zero_warn(
                f"All {len(held)} tensors of an optimizer ({type(optimizer).__name__}) are frozen, so it trains "
                f"nothing: {listing(idle, 3)}. If they are to be trained, as a discriminator or the weights of a loss "
                "beside an adapted network, list their modules in modules_to_save, or leave them out of `target`."
            )
