"""Every tensor that is to be trained sits in exactly one parameter group, or the run stops and says why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lora_plugins import StateError
from lora_plugins.errors import listing
from lora_plugins.injector import adapter_tensors
from lora_plugins.integrations.lightning.checkpoint import adapted_targets, trained_parameters

_ADVICE = (
    "Build the optimizer in configure_optimizers, from the parameters that require a gradient: "
    "[p for p in self.parameters() if p.requires_grad]."
)


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Yields the optimizers in whatever form `configure_optimizers` returned them."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for entry in configured:
            yield from optimizers_in(entry)


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
    groups = [group for optimizer in optimizers_in(configured) for group in optimizer.param_groups]
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


def parameter_groups(
    module: nn.Module, *, lr: float, b_ratio: float = 1.0, heads_lr: float | None = None
) -> list[dict[str, Any]]:
    """Returns parameter groups with learning rates of their own for A, B and what is trained in full.

    For use in `configure_optimizers`, where the module is adapted already. That B learns faster than A is LoRA+
    (Hayou et al., arXiv 2402.12354), which suggests a ratio of about 16.

    Args:
        module: The LightningModule.
        lr: Learning rate of A.
        b_ratio: Learning rate of B, as a multiple of that of A.
        heads_lr: Learning rate of everything else that requires a gradient: heads, biases, what lies outside the
            adapters' targets. By default `lr`.

    Returns:
        The groups `A`, `B` and `heads`, under the key `name`; those that would be empty are left out.
    """
    factors = {
        id(parameter): name.split(".")[-2].removeprefix("lora_")[:1]
        for target in adapted_targets(module).values()
        for name, parameter in adapter_tensors(target).items()
    }
    rates = {"A": lr, "B": lr * b_ratio, "heads": lr if heads_lr is None else heads_lr}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for parameter in module.parameters():
        if parameter.requires_grad:
            members[factors.get(id(parameter), "heads")].append(parameter)
    return [{"name": name, "params": members[name], "lr": rate} for name, rate in rates.items() if members[name]]
