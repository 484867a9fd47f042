"""Every tensor that is to be trained sits in exactly one parameter group, or the run stops and says why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.checkpoint.content import trained_parameters

_ADVICE = (
    "Build the optimizer in configure_optimizers, from the parameters that require a gradient: "
    "[p for p in self.parameters() if p.requires_grad]."
)


def leaves(configured: Any) -> Iterator[Any]:
    """Yields optimizers, schedulers and all else, in whatever form `configure_optimizers` returned them."""
    if isinstance(configured, Mapping):
        for value in configured.values():
            yield from leaves(value)
    elif isinstance(configured, list | tuple):
        for entry in configured:
            yield from leaves(entry)
    else:
        yield configured


def complete(module: nn.Module, configured: Any) -> None:
    """Puts trainable tensors that are in no optimizer into the one group there is, in place, and says so.

    An optimizer that was built before the adapters existed holds the frozen base only, as the one that the stock
    LightningCLI makes of a YAML file does. Adding to its group keeps schedulers and their state valid.

    Args:
        module: The adapted module.
        configured: What its `configure_optimizers` returned.

    Raises:
        StateError: If it is not clear where the missing tensors belong, or a tensor is in two groups.
    """
    groups = [group for leaf in leaves(configured) if isinstance(leaf, Optimizer) for group in leaf.param_groups]
    trained = trained_parameters(module)
    missing = _missing(trained, groups)
    if missing and len(groups) == 1:
        groups[0]["params"].extend(missing.values())
        rank_zero_warn(
            f"The optimizer was built before the adapters existed and would not train {listing(missing, 3)}. They were "
            f"added to its parameter group now. {_ADVICE}"
        )
    _verify(trained, groups)


def _verify(trained: Mapping[str, nn.Parameter], groups: list[dict[str, Any]]) -> None:
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
    held = {id(p) for group in groups for p in group["params"]}
    return {name: p for name, p in trained.items() if id(p) not in held}
