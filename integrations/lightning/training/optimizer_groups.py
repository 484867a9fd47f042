"""Checks that every trainable tensor is in exactly one parameter group, and adds those that are missing."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.module import trained_parameters

_ADVICE = (
    "Build the optimizer in configure_optimizers, from the parameters that require a gradient: "
    "[p for p in self.parameters() if p.requires_grad]."
)


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


def add_missing_parameters(module: nn.Module, configured: Any) -> None:
    """Adds trainable tensors that are in no optimizer to the only parameter group, in place, and warns.

    An optimizer that was built before the adapters existed has the frozen base only, as the one that the stock
    LightningCLI makes of a YAML file. Adding to its group keeps schedulers and their state valid.

    Args:
        module: The adapted module.
        configured: What its `configure_optimizers` returned.

    Raises:
        StateError: If it is not clear where the missing tensors belong, or a tensor is in two groups.
    """
    groups = [group for leaf in flatten(configured) if isinstance(leaf, Optimizer) for group in leaf.param_groups]
    trained = trained_parameters(module)
    missing = _missing(trained, groups)
    if missing and len(groups) == 1:
        groups[0]["params"].extend(missing.values())
        rank_zero_warn(
            f"The optimizer was built before the adapters existed and would not train {listing(missing, 3)}. They were "
            f"added to its parameter group now. {_ADVICE}"
        )
    _check_groups(trained, groups)


def _check_groups(trained: Mapping[str, nn.Parameter], groups: list[dict[str, Any]]) -> None:
    missing = _missing(trained, groups)
    if missing:
        raise StateError(
            f"{len(missing)} trainable tensors are in no optimizer and would never move: {listing(missing)}. There are "
            f"{len(groups)} parameter groups, so it is not clear where they belong. {_ADVICE}"
        )
    counts = Counter(id(p) for group in groups for p in group["params"])
    doubled = [name for name, p in trained.items() if counts[id(p)] > 1]
    if doubled:
        raise StateError(f"{listing(doubled)} are in more than one parameter group. Leave each in one of them.")


def _missing(trained: Mapping[str, nn.Parameter], groups: list[dict[str, Any]]) -> dict[str, nn.Parameter]:
    present = {id(p) for group in groups for p in group["params"]}
    return {name: p for name, p in trained.items() if id(p) not in present}
