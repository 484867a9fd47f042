"""Merging: the updates of active adapters are written into the weights, and taken back bit for bit."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lora_plugins.errors import MergeError, StateError, listing
from lora_plugins.layer import (
    layer_state,
    peek_weight,
    state_of,
    update,
    weight_key,
    weight_names,
)
from lora_plugins.layer_plugin import add_update
from lora_plugins.modules import holder_of, model_modules
from lora_plugins.state import ModelState, adapted_layers, apply_state

DEFAULT_MAX_ERROR = 0.1
"""Share of an update's norm that a merge may lose to rounding without being told to."""


@dataclass(frozen=True)
class MergedWeight:
    """One weight that took an update.

    Args:
        name: Full name of the weight.
        relative_error: Norm of what rounding changed of the update, over the norm of the update; 0 for no update.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        adapters: The adapters that were merged.
        weights: The weights that changed.
    """

    adapters: tuple[str, ...]
    weights: tuple[MergedWeight, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((weight.relative_error for weight in self.weights), default=0.0)

    def __str__(self) -> str:
        return (
            f"merged {listing(self.adapters)} into {len(self.weights)} weights, relative error at most {self.worst:.1e}"
        )


@dataclass(frozen=True)
class _Merge:
    name: str
    layer: nn.Module
    tensor: str
    merged: Tensor
    relative_error: float


def merge(model: nn.Module, state: ModelState, adapters: tuple[str, ...], max_error: float) -> MergeReport:
    """Writes the updates of adapters into the weights and keeps the untouched weights.

    Raises:
        StateError: If one of the adapters is not active, or merged already.
        MergeError: If a weight is shared with a layer that is not adapted, or rounding would lose too much.
    """
    _check(model, state, adapters)
    merges = list(_merges(model, adapters))
    _refuse_loss(merges, max_error)
    for item in merges:
        parameter = item.layer._parameters.get(item.tensor)
        if parameter is None:
            layer_state(item.layer).merged[item.tensor] = item.merged
        else:
            state.kept.setdefault(item.name, parameter.data)
            parameter.data = item.merged
    state.merged = (*state.merged, *adapters)
    apply_state(model, state)
    return _report(adapters, merges)


def unmerge(model: nn.Module, state: ModelState) -> None:
    """Puts the kept weights back, bit for bit."""
    for name, weight in state.kept.items():
        module, key = holder_of(model, name)
        parameter = module._parameters[key]
        assert parameter is not None
        parameter.data = weight.to(parameter)
    for layer in adapted_layers(model).values():
        layer_state(layer).merged.clear()
    state.kept = {}
    state.merged = ()
    apply_state(model, state)


def merge_for_good(model: nn.Module, state: ModelState, max_error: float) -> MergeReport:
    """Writes the updates of all active adapters into the weights without keeping the untouched ones.

    The updates are computed twice, to check all of them before the first weight changes.

    Raises:
        MergeError: As `merge` does.
    """
    adapters = tuple(name for name in state.active if name not in state.merged)
    _check(model, state, adapters)
    checked = [
        _Merge(m.name, m.layer, m.tensor, m.merged.new_empty(0), m.relative_error) for m in _merges(model, adapters)
    ]
    _refuse_loss(checked, max_error)
    for item in _merges(model, adapters):
        parameter = item.layer._parameters.get(item.tensor)
        if parameter is None:
            layer_state(item.layer).merged[item.tensor] = item.merged
        else:
            parameter.data = item.merged
    state.kept = {}
    return _report(adapters, checked)


def make_plain(layer: nn.Module, merged: dict[str, Tensor]) -> None:
    """Turns computed weights of an untouched layer into plain parameters with merged values.

    Args:
        layer: A layer without adapters.
        merged: The merged values by attribute name.

    Raises:
        MergeError: If it is not known how the weight is computed.
    """
    for name, value in merged.items():
        if parametrize.is_parametrized(layer, name):
            _remove_parametrization(layer, name)
        else:
            _remove_hook(layer, name)
            del layer._parameters[name]
        layer.register_parameter(name, nn.Parameter(value))


def _remove_parametrization(layer: nn.Module, name: str) -> None:
    """Drops a parametrization and its tensors; torch's own function would break copies that share the class."""
    parametrizations = layer.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    del parametrizations[name]
    parametrized = type(layer)
    if len(parametrizations):
        rest = {key: value for key, value in vars(parametrized).items() if key != name}
        layer.__class__ = type(parametrized.__name__, parametrized.__bases__, rest)
    else:
        del layer.parametrizations
        layer.__class__ = parametrized.__bases__[0]


def _remove_hook(layer: nn.Module, name: str) -> None:
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            remove_weight_norm(layer, name)
            return
        if isinstance(hook, SpectralNorm) and hook.name == name:
            remove_spectral_norm(layer, name)
            return
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            prune.remove(layer, name)  # type: ignore[no-untyped-call]
            return
    raise MergeError(f"{name!r} of {type(layer).__name__} is computed in a way that cannot be merged for good.")


def _merges(model: nn.Module, adapters: tuple[str, ...]) -> Iterator[_Merge]:
    """Computes the merged value of each weight that one of the adapters updates, a tied weight once."""
    seen: set[int] = set()
    for name, layer in adapted_layers(model).items():
        state = layer_state(layer)
        for tensor in weight_names(state):
            key = weight_key(layer, tensor)
            if key in seen:
                continue
            with torch.no_grad():
                weight = state.merged[tensor] if tensor in state.merged else peek_weight(layer, tensor)
                deltas = [
                    delta
                    for adapter in adapters
                    if adapter in state.adapters and (delta := update(layer, tensor, adapter, weight.shape)) is not None
                ]
                if not deltas:
                    continue
                delta = torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
                merged = add_update(weight, delta)
                if merged.stride() != weight.stride():  # keeps the memory format
                    merged = torch.empty_like(weight).copy_(merged)
                yield _Merge(f"{name}.{tensor}".removeprefix("."), layer, tensor, merged, _error(weight, merged, delta))
            if key is not None:
                seen.add(key)


def _error(weight: Tensor, merged: Tensor, delta: Tensor) -> float:
    norm = torch.linalg.vector_norm(delta)
    if norm == 0:
        return 0.0
    lost = (merged.to(delta.dtype) - weight.to(delta.dtype)).sub_(delta)
    return float(torch.linalg.vector_norm(lost) / norm)


def _check(model: nn.Module, state: ModelState, adapters: tuple[str, ...]) -> None:
    for name in adapters:
        state.adapter(name)
        if name in state.merged:
            raise StateError(f"The adapter {name!r} is merged already.")
        if name not in state.active:
            raise StateError(f"The adapter {name!r} is not active. Call set_adapter({name!r}) first.")
    for name in adapters:
        refuse_shared(model, _updated(model, name))


def _updated(model: nn.Module, adapter: str) -> dict[str, set[str]]:
    """The weights that an adapter updates, by layer name."""
    return {
        name: {slot.tensor for slot in state.adapters[adapter].slots}
        for name, layer in adapted_layers(model).items()
        if (state := state_of(layer)) is not None and adapter in state.adapters
    }


def refuse_shared(model: nn.Module, weights: Mapping[str, Collection[str]]) -> None:
    """Refuses to change a tensor that another layer uses too.

    Args:
        model: The model.
        weights: By layer name, the attribute names of all weights that are about to change.

    Raises:
        MergeError: If one of them is also a parameter that is not among them, naming both.
    """
    changing = {
        key: f"{layer}.{tensor}"
        for layer, tensors in weights.items()
        for tensor in tensors
        if (key := weight_key(model.get_submodule(layer), tensor)) is not None
    }
    for entry in model_modules(model):
        for own, parameter in entry.module._parameters.items():
            if parameter is not None and id(parameter) in changing and own not in weights.get(entry.name, ()):
                raise MergeError(
                    f"{changing[id(parameter)]!r} is the same tensor as {entry.name + '.' + own!r}, which the adapter "
                    f"does not adapt and which would change with it. Add {entry.name!r} to target_modules, or "
                    "untie the two."
                )


def _refuse_loss(merges: list[_Merge], max_error: float) -> None:
    lossy = [item for item in merges if not item.relative_error <= max_error]
    if lossy:
        worst = max(lossy, key=lambda item: item.relative_error)
        raise MergeError(
            f"Merging would lose {worst.relative_error:.0%} of the update of {worst.name!r} "
            f"({peek_weight(worst.layer, worst.tensor).dtype}) to rounding, and more than {max_error:.0%} in "
            f"{len(lossy)} of {len(merges)} weights. Convert the model to a wider type first (model.float()), or "
            "allow it with max_error."
        )


def _report(adapters: tuple[str, ...], merges: list[_Merge]) -> MergeReport:
    return MergeReport(adapters, tuple(MergedWeight(item.name, item.relative_error) for item in merges))
