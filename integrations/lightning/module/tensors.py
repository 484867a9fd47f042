"""Which tensors of a module are trained, which are the frozen base, and which were built after it was adapted."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from lora_plugins import LoraModel
from lora_plugins.adapter import adapter_tensors, present_state
from lora_plugins.inplace import (
    StoredWeight,
    full_name,
    model_modules,
    named_parameters,
    named_tensors,
    own_buffers,
    own_parameters,
    state_of,
)
from lora_plugins.integrations.lightning.module.adapted_parts import adapted_targets, adapted_weights
from lora_plugins.integrations.lightning.module.merged_base import merged_weights
from lora_plugins.integrations.lightning.module.moved_tensors import moved_by_hand


def frozen_keys(module: nn.Module) -> set[str]:
    """Returns the names of tensors that are not saved: the frozen base of all adapted targets.

    All other tensors are saved: adapters, heads and biases, what lies outside the targets, every buffer but those of
    normalization layers that are held in eval mode, what the module moved by hand, and weights that an earlier adapter
    was merged into.
    """
    return _frozen_names(module) - set(merged_weights(module))


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that no adapter of the module may change, by name; see `frozen_keys`."""
    names = _frozen_names(module)
    return {name: tensor for name, tensor in named_tensors(module).items() if name in names}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that the module's adapters train, by name.

    Parameters outside the targets are the user's own, and the network of a metric is not trained.
    """
    return {name: p for name, p in _meant_to_be_trained(module).items() if p.requires_grad}


def tensors_beside_merges(module: nn.Module) -> dict[str, Tensor]:
    """Returns by name what adapters train and the frozen base, without the weights that a merge changes."""
    merged, every = adapted_weights(module), {**frozen_tensors(module), **trained_parameters(module)}
    return {name: tensor for name, tensor in every.items() if name not in merged}


def frozen_by_author(module: nn.Module) -> set[str]:
    """Returns the parameters below adapted targets that required no gradient before there were adapters."""
    return {
        full_name(path, name)
        for path, target in adapted_targets(module).items()
        for name, required in present_state(target).requires_grad.items()
        if not required
    }


def frozen_by_others(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns by name the parameters of active adapters that other code has frozen since they were added."""
    return {name: p for name, p in _meant_to_be_trained(module).items() if not p.requires_grad}


def built_since(module: nn.Module) -> list[str]:
    """Returns the parameters below adapted targets that were built after there were adapters, as in a first step.

    They are the author's own: nothing freezes them, the optimizer has them if the author gave it them, and checkpoints
    hold them.
    """
    return [full_name(path, name) for path, t in adapted_targets(module).items() for name in _built_since(t)]


def built_too_late(module: nn.Module) -> list[str]:
    """Returns the layers that were built since and that an adapter would adapt, if it were added now."""
    found: list[str] = []
    for path, target in adapted_targets(module).items() if built_since(module) else ():
        for adapter in present_state(target).adapters.values():
            known = {layer.name for layer in adapter.plan.layers}
            where = replace(
                adapter.plan.config,
                init="none",
                init_options={},
                quantize=None,
                quantize_options={},
                quantize_modules=None,
            )
            now = [layer.name for layer in LoraModel.plan(target, where).layers]
            found += [full_name(path, name) for name in now if name not in known]
    return found


def _frozen_names(module: nn.Module) -> set[str]:
    frozen = {id(tensor) for target in adapted_targets(module).values() for tensor in _frozen_tensors_of(target)}
    named = named_tensors(module, aliases=True)
    return {name for name, tensor in named.items() if id(tensor) in frozen} - moved_by_hand(module)


def _frozen_tensors_of(target: nn.Module) -> Iterator[Tensor]:
    plans = [adapter.plan for adapter in present_state(target).adapters.values()]
    changing = {name for plan in plans for name in plan.saved_in_place}
    norms = set.intersection(*(set(plan.frozen_norms) for plan in plans))
    modules = model_modules(target)
    late = _built_since(target)
    for name, tensor in own_parameters(modules).items():
        if name not in changing and name not in late:
            yield tensor
    for name, tensor in own_buffers(modules).items():
        if name.rpartition(".")[0] in norms and name not in changing:
            yield tensor


def _meant_to_be_trained(module: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for path, target in adapted_targets(module).items():
        state = present_state(target)
        acting = state.unmerged if state.trainable else ()
        in_place = {name for adapter in acting for name in state.adapters[adapter].plan.trained}
        factors = {name for name in adapter_tensors(target) if name.rpartition(".")[2] in acting}
        own = named_parameters(target)
        found.update({full_name(path, name): own[name] for name in own if name in in_place or name in factors})
    return found


def _built_since(target: nn.Module) -> list[str]:
    known, modules = present_state(target).requires_grad, model_modules(target)
    ours = {e.name for e in modules if state_of(e.module) is not None or isinstance(e.module, StoredWeight)}
    return [name for name in own_parameters(modules) if name not in known and name.rpartition(".")[0] not in ours]
