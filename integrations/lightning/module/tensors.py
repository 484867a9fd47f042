"""Which tensors of a module belong to its adapters, which are trained, and which are the frozen base."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn

from lora_plugins import LoraError, LoraModel
from lora_plugins.adapter import ModelState, adapted_layers, adapter_tensors, model_state
from lora_plugins.inplace import (
    StoredWeight,
    full_name,
    model_modules,
    named_parameters,
    named_tensors,
    own_tensors,
    submodule,
)
from lora_plugins.integrations.lightning.module.merged_base import merged_weights

Fingerprints = Mapping[str, Mapping[str, float]]
"""Of tensors, by full name."""

_MOVED = "_lora_moved"
"""Attribute of a LightningModule with the names of what it moved by hand; only modules that did have it."""


def adapted_targets(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules below (and including) `module` that carry adapters, by path."""
    return {entry.name: entry.module for entry in model_modules(module) if model_state(entry.module) is not None}


def state_of_adapters(target: nn.Module) -> ModelState:
    """Returns the state of the adapters of a module that carries some.

    Raises:
        LoraError: If it carries none.
    """
    state = model_state(target)
    if state is None:
        raise LoraError("The module lost its adapters while they were read.")
    return state


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


def _frozen_names(module: nn.Module) -> set[str]:
    frozen = {id(tensor) for target in adapted_targets(module).values() for tensor in _frozen_tensors_of(target)}
    named = named_tensors(module, aliases=True)
    return {name for name, tensor in named.items() if id(tensor) in frozen} - moved_by_hand(module)


def moved_by_hand(module: nn.Module) -> frozenset[str]:
    """Returns the names of tensors that no adapter changes and the module itself has changed: see `mark_moved`."""
    found: frozenset[str] = module.__dict__.get(_MOVED, frozenset())
    return found


def adapted_layers_moved(module: nn.Module) -> list[str]:
    """Returns the adapted weights, by name, that the module has changed by hand."""
    return sorted(moved_by_hand(module).intersection(adapted_weights(module)))


def adapted_weights(module: nn.Module) -> list[str]:
    """Returns the names of the tensors of layers that have adapters."""
    return [
        full_name(path, full_name(name, key))
        for path, target in adapted_targets(module).items()
        for name, layer in adapted_layers(target).items()
        for key, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    ]


def mark_moved(module: nn.Module, names: Iterable[str], before: Fingerprints = MappingProxyType({})) -> None:
    """Records, on the module, that it changes tensors of a teacher by hand: checkpoints hold them from now on.

    Args:
        module: The module.
        names: The tensors.
        before: What `known_fingerprints` returned before; by default those that are known now.
    """
    moved = moved_by_hand(module) | frozenset(names)
    if moved:
        module.__dict__[_MOVED] = moved
    for path, target in adapted_targets(module).items():
        for adapter in state_of_adapters(target).adapters.values():
            known = {full_name(path, name): (name, values) for name, (_, values) in adapter.fingerprints.items()}
            for full, (name, values) in known.items():
                if full in moved or any(_computes(source, full) for source in moved):
                    adapter.kept.setdefault(name, dict(before.get(full, values)))


def _computes(source: str, weight: str) -> bool:
    """Whether a tensor has the name of one that weight norm or a parametrization computes a weight from."""
    layer, _, own = weight.rpartition(".")
    return source.startswith((f"{weight}_", f"{layer}.parametrizations.{own}."))


def known_fingerprints(module: nn.Module) -> Fingerprints:
    """Returns the fingerprints of what adapters are trained on, by full name, as far as they were taken.

    Adapters forget them when a base is loaded.
    """
    return {
        full_name(path, name): values
        for path, target in adapted_targets(module).items()
        for adapter in state_of_adapters(target).adapters.values()
        for name, (_, values) in adapter.fingerprints.items()
    }


def take_fingerprints(module: nn.Module) -> None:
    """Takes fingerprints of what adapters are trained on, where none have been taken since it was loaded.

    They have to be taken before the module moves any of it by hand; those that are known are of the values it had when
    it was built, which is how it will be built again.
    """
    for target in adapted_targets(module).values():
        for name, adapter in state_of_adapters(target).adapters.items():
            if not adapter.fingerprints:
                LoraModel(target).pack(name)


def frozen_by_author(module: nn.Module) -> set[str]:
    """Returns the parameters below adapted targets that required no gradient before there were adapters."""
    return {
        full_name(path, name)
        for path, target in adapted_targets(module).items()
        for name, required in state_of_adapters(target).requires_grad.items()
        if not required
    }


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
        for adapter in state_of_adapters(target).adapters.values():
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


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that the module's adapters train, by name.

    Parameters outside the targets are the user's own, and the network of a metric is not trained.
    """
    return {name: p for name, p in _meant_to_be_trained(module).items() if p.requires_grad}


def frozen_by_others(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns by name the parameters of active adapters that other code has frozen since they were added."""
    return {name: p for name, p in _meant_to_be_trained(module).items() if not p.requires_grad}


def layers_of_factors(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the adapted layer to which each A and B belongs, by the name of the latter in the module."""
    found: dict[str, nn.Module] = {}
    for path, target in adapted_targets(module).items():
        for name in adapter_tensors(target):
            layer = name.rpartition(".")[0].rpartition(".")[0]  # LAYER.lora_A.ADAPTER
            found[full_name(path, name)] = submodule(target, layer)
    return found


def _meant_to_be_trained(module: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for path, target in adapted_targets(module).items():
        state = state_of_adapters(target)
        acting = state.unmerged if state.trainable else ()
        in_place = {name for adapter in acting for name in state.adapters[adapter].plan.trained}
        factors = {name for name in adapter_tensors(target) if name.rpartition(".")[2] in acting}
        own = named_parameters(target)
        found.update({full_name(path, name): own[name] for name in own if name in in_place or name in factors})
    return found


def _built_since(target: nn.Module) -> list[str]:
    known, adapted = state_of_adapters(target).requires_grad, adapted_layers(target)
    modules = model_modules(target)
    ours = adapted.keys() | {entry.name for entry in modules if isinstance(entry.module, StoredWeight)}
    own = own_tensors(modules, "_parameters")
    return [name for name in own if name not in known and name.rpartition(".")[0] not in ours]


def _frozen_tensors_of(target: nn.Module) -> Iterator[Tensor]:
    plans = [adapter.plan for adapter in state_of_adapters(target).adapters.values()]
    changing = {name for plan in plans for name in (*plan.trained, *plan.saved_buffers)}
    norms = set.intersection(*(set(plan.frozen_norms) for plan in plans))
    modules = model_modules(target)
    late = _built_since(target)
    for name, tensor in own_tensors(modules, "_parameters").items():
        if name not in changing and name not in late:
            yield tensor
    for name, tensor in own_tensors(modules, "_buffers").items():
        if name.rpartition(".")[0] in norms and name not in changing:
            yield tensor
