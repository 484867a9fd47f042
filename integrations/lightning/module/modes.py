"""Training and eval mode of the parts of an adapted module."""

from collections.abc import Collection, Mapping

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lora_plugins.adapter import adapter_tensors, present_state
from lora_plugins.errors import counted, listing
from lora_plugins.inplace import AdapterTensors, is_frozen, model_modules, own_mode
from lora_plugins.utils import path_starts, plain_name, within


def set_training_mode(target: nn.Module, averages: Collection[nn.Module]) -> None:
    """Puts an adapted module into training mode, and reports which parts of it changed.

    Frozen normalization layers stay in eval mode, and so do parts that their author froze and put into eval mode, such
    as a teacher. A part counts as frozen if none of its parameters required a gradient before there were adapters. One
    that has buffers and no parameters, such as a loss network, counts as frozen if the module around it is in training
    mode. Copies of other parts (`averages`) that are in eval mode stay so as well.
    """
    modes = {child: own_mode(child) for child in target.modules()}
    kept = _kept_in_eval_mode(target, averages, modes)
    target.train(True)  # by place: a `train` that its author has replaced may have no default, or another name
    named = [(plain_name(n), child) for n, child in target.named_modules() if not isinstance(child, AdapterTensors)]
    for name, child in named:  # outer ones first, since `train` goes down
        if within(name, kept):
            child.train(modes[child])
    changed = dict.fromkeys(name for name, child in named if child.training and not modes[child])
    if changed:
        rank_zero_info(
            f"{counted(len(changed), 'module')} arrived in eval mode and had to be put into training mode: "
            f"{listing(changed, 3)}. Use LoraCallback(train_mode=False) to keep their mode."
        )
    _tell_trained(target, [name for name, part in kept.items() if part not in averages])


def modes_of_frozen_norms(module: nn.Module) -> dict[str, bool]:
    """Returns the mode of each normalization layer that is kept in eval mode, as it would be without."""
    return {entry.name: own_mode(entry.module) for entry in model_modules(module) if is_frozen(entry.module)}


def set_modes_of_frozen_norms(module: nn.Module, modes: Mapping[str, bool]) -> None:
    """Restores the mode that they had before validation.

    Lightning reads the mode of every layer before validation and writes it back after, which for these is always eval
    mode: after the adapters are gone, their statistics would never change again.
    """
    for entry in model_modules(module):
        if entry.name in modes and is_frozen(entry.module):
            entry.module.train(modes[entry.name])


def _tell_trained(target: nn.Module, parts: Collection[str]) -> None:
    """Says which parts stay frozen and in eval mode although adapters train them.

    It is a warning where adapters are on others as well: patterns have matched a teacher or a loss network, it seems.
    """
    trained = {name.rsplit(".", 2)[0] for name, factor in adapter_tensors(target).items() if factor.requires_grad}
    adapted = [name for name in trained if within(name, parts)]
    if adapted:
        adapted_parts = [part for part in parts if any(within(name, [part]) for name in adapted)]
        tell = rank_zero_info if len(adapted) == len(trained) else rank_zero_warn
        tell(
            f"{listing(adapted_parts, 3)} arrived frozen and in eval mode, and stay so, though adapters train "
            f"{counted(len(adapted), 'layer')} there: dropout does nothing. Leave what is to stay as it is, such as a "
            "teacher or a loss network, out with exclude_modules; call train() before fit on what is to be trained as "
            "usual."
        )


def _kept_in_eval_mode(
    target: nn.Module, averages: Collection[nn.Module], modes: Mapping[nn.Module, bool]
) -> dict[str, nn.Module]:
    """Returns by name the parts below the target that their author put into eval mode permanently."""
    required: dict[str, list[bool]] = {}
    for name, value in present_state(target).requires_grad.items():
        for start in path_starts(name):
            required.setdefault(start, []).append(value)
    entries = model_modules(target)
    by_name = {entry.name: entry.module for entry in entries}
    parts: dict[str, nn.Module] = {}
    for entry in entries[1:]:
        if modes[entry.module] or within(entry.name, parts):
            continue
        own, around = required.get(entry.name, ()), by_name[entry.name.rpartition(".")[0]]
        if own:
            keeps = not any(own) or entry.module in averages
        else:
            keeps = modes[around] and next(entry.module.buffers(), None) is not None
        if keeps:
            parts[entry.name] = entry.module
    return parts
