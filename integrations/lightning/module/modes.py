"""Training and eval mode of the parts of an adapted module."""

from collections.abc import Collection, Mapping

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lora_plugins.errors import listing
from lora_plugins.inplace import is_frozen, model_modules, own_mode, state_of
from lora_plugins.integrations.lightning.module.tensors import state_of_adapters


def set_training_mode(target: nn.Module, averages: Collection[nn.Module] = ()) -> None:
    """Puts an adapted module into training mode, and reports which parts of it changed.

    Frozen normalization layers stay in eval mode, and so does what its author froze and put into eval mode: a teacher,
    say. A part counts as frozen if it has parameters, none of which required a gradient before there were adapters.

    Args:
        target: The module.
        averages: Parts of it that are copies of others: those that are in eval mode stay so as well.
    """
    modes = {name: own_mode(child) for name, child in target.named_modules()}
    kept = _kept_in_eval_mode(target, averages)
    target.train()
    for part in kept.values():  # outer ones first, since `train` goes down
        for name, child in part.items():
            child.train(modes[name])
    changed = [name for name, child in target.named_modules() if child.training and not modes[name]]
    if changed:
        rank_zero_info(
            f"{len(changed)} modules arrived in eval mode and were put into training mode: {listing(changed, 3)}. Use "
            "LoraCallback(train_mode=False) to keep their mode."
        )
    own = {name: part for name, part in kept.items() if not any(part[name] is average for average in averages)}
    adapted = [name for part in own.values() for name, child in part.items() if state_of(child) is not None]
    if adapted:
        rank_zero_info(
            f"{listing(own, 3)} arrived frozen and in eval mode, and stay so, though {len(adapted)} layers in it are "
            "adapted: dropout does nothing there. Call train() on it before fit if it is to be trained as usual."
        )


def modes_of_frozen_norms(module: nn.Module) -> dict[str, bool]:
    """Returns the mode of each normalization layer that is kept in eval mode, as it would be without."""
    return {name: own_mode(child) for name, child in module.named_modules() if is_frozen(child)}


def set_modes_of_frozen_norms(module: nn.Module, modes: Mapping[str, bool]) -> None:
    """Gives them back the mode that they had before validation.

    Lightning reads the mode of every layer before validation and writes it back after, which for these is always eval
    mode: after the adapters are gone, their statistics would stand still for ever.
    """
    for name, child in module.named_modules():
        if name in modes and is_frozen(child):
            child.train(modes[name])


def _kept_in_eval_mode(target: nn.Module, averages: Collection[nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """Returns the modules of each part, below the target itself, that its author put into eval mode for good."""
    required = state_of_adapters(target).requires_grad
    parts: dict[str, dict[str, nn.Module]] = {}
    modules = model_modules(target)
    for entry in modules[1:]:
        if own_mode(entry.module) or any(_is_in(entry.name, part) for part in parts):
            continue
        own = [required[name] for name in required if _is_in(name, entry.name)]
        if own and (not any(own) or any(entry.module is average for average in averages)):
            parts[entry.name] = {other.name: other.module for other in modules if _is_in(other.name, entry.name)}
    return parts


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
