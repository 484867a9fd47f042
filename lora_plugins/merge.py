"""Merging: the updates of active adapters are written into the weights, and taken back bit for bit."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins.autocast import in_full
from lora_plugins.computed import compute_again, make_plain, remover
from lora_plugins.errors import MergeError, StateError, listing
from lora_plugins.functions.linear import updated
from lora_plugins.functions.products import contract, linear
from lora_plugins.layer import (
    STATE,
    AdapterTensors,
    layer_state,
    peek_weight,
    standing_still,
    state_of,
    terms_of,
    weight_key,
    weight_names,
)
from lora_plugins.layer_plugin import LayerPlugin, Slot, Term, add_update, joined, total
from lora_plugins.modules import holder_of, model_modules
from lora_plugins.state import ModelState, adapted_layers, apply_state, close_state
from lora_plugins.variant_plugin import PLAIN

DEFAULT_MAX_ERROR = 0.1
"""Share of an update's norm that a merge may lose to rounding without being told to."""

_SURELY_SMALL = 1e-3
"""Below this bound the loss is not measured, which would take four more passes over the weight."""

_NEARLY_ORTHOGONAL = 1e-3
"""Cosine down to which an inner product in float32 has three digits."""


@dataclass(frozen=True)
class MergedWeight:
    """One weight that took an update.

    Args:
        name: Full name of the weight.
        relative_error: Norm of what rounding changed of the update, over the norm of the update; 0 for no update.
            Where half a unit in the last place of every element is too little to matter, that bound is given.
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
class _Update:
    """What is about to be added to one weight."""

    name: str
    layer: nn.Module
    tensor: str
    plugin: LayerPlugin
    weight: Tensor
    term: Term

    def merged(self) -> Tensor:
        """Returns the weight with its update: computed in float32 or better, rounded once, in its memory format."""
        term, weight = self.term, self.weight
        matrix = self.plugin.to_matrix(weight)
        with in_full(weight):
            if term.delta is None:
                matrix = updated(matrix, term.A, term.B, term.scaling, weight.dtype)
            else:
                matrix = add_update(matrix, term.delta)
        merged = self.plugin.from_matrix(matrix, weight.shape)
        return merged if merged.stride() == weight.stride() else torch.empty_like(weight).copy_(merged)

    def write(self, merged: Tensor) -> None:
        """Puts the weight with its update in its place."""
        parameter = self.layer._parameters.get(self.tensor)
        if parameter is None:
            layer_state(self.layer).merged[self.tensor] = merged
        else:
            parameter.data = merged

    def relative_error(self) -> float:
        """Returns the share of the update that rounding takes, or a bound of it that is surely small."""
        with in_full(self.weight):
            norm = _norm(self.term)
            if norm == 0:
                return 0.0
            wide = torch.promote_types(self.weight.dtype, self.term.A.dtype)
            largest = float(torch.linalg.vector_norm(self.weight, dtype=wide)) + norm
            bound = torch.finfo(self.weight.dtype).eps / 2 * largest / norm
            return bound if bound <= _SURELY_SMALL else self._lost(wide) / norm

    def _lost(self, wide: torch.dtype) -> float:
        """Returns the norm of what rounding takes."""
        delta = self.plugin.from_matrix(self.term.matrix(), self.weight.shape).to(wide)
        return float(torch.linalg.vector_norm((self.merged().to(wide) - self.weight.to(wide)).sub_(delta)))


@torch.no_grad()
def merge(model: nn.Module, state: ModelState, adapters: tuple[str, ...], max_error: float) -> MergeReport:
    """Writes the updates of adapters into the weights and keeps the untouched weights.

    Raises:
        StateError: If one of the adapters is not active, or merged already.
        MergeError: If a weight is shared with a layer that is not adapted, or rounding would lose too much.
    """
    layers = adapted_layers(model)
    report = _checked(model, layers, state, adapters, max_error)
    merged = [(update, update.merged()) for update in _updates(layers, adapters)]
    for update, weight in merged:
        parameter = update.layer._parameters.get(update.tensor)
        if parameter is not None:
            state.kept.setdefault(update.name, parameter.data)
        update.write(weight)
    state.merged = (*state.merged, *adapters)
    apply_state(model, state)
    return report


@torch.no_grad()
def merge_for_good(model: nn.Module, state: ModelState, max_error: float) -> None:
    """Writes the updates of all active adapters into the weights and takes all adapters off the model.

    One layer after the other, so that the model is not in memory twice, and such that it computes the same between any
    two steps. Stopped in the middle, it can be called again.

    Raises:
        MergeError: As `merge` does, or if a weight is computed in an unknown way.
    """
    layers = adapted_layers(model)
    adapters = tuple(name for name in state.active if name not in state.merged)
    _checked(model, layers, state, adapters, max_error)
    _refuse_unknown(layers, adapters)
    for group in _sharing(layers):
        merged = {_place(update.layer, update.tensor): update.merged() for update in _updates(group, adapters)}
        state.leaving, state.kept = True, {}
        for layer in group.values():
            _answer_with(layer, merged)
        for layer in group.values():
            _leave(layer)
    close_state(model)


def _answer_with(layer: nn.Module, merged: Mapping[object, Tensor]) -> None:
    """Makes a layer use merged weights in place of its updates, in one assignment."""
    state = layer_state(layer)
    own = {name: merged[place] for name in weight_names(state) if (place := _place(layer, name)) in merged}
    layer.__dict__[STATE] = replace(state, merged={**state.merged, **own}, active=(), branch=None)


def _leave(layer: nn.Module) -> None:
    """Puts merged weights in their places and takes all adapters off a layer; may be done again from any step."""
    state, computed = layer_state(layer), {}
    for name, value in state.merged.items():
        parameter = layer._parameters.get(name)
        if parameter is None:
            computed[name] = value
        else:
            parameter.data = value
    layer.__class__ = cast(Any, state.base_class)
    for name in [name for name, child in layer._modules.items() if isinstance(child, AdapterTensors)]:
        del layer._modules[name]
    for name, value in computed.items():
        make_plain(layer, name, value)
    del layer.__dict__[STATE]


def _place(layer: nn.Module, tensor: str) -> object:
    """Identifies a weight, the same for all layers that share it."""
    return weight_key(layer, tensor) or (id(layer), tensor)


def _places(layer: nn.Module) -> set[object]:
    return {_place(layer, tensor) for tensor in weight_names(layer_state(layer))}


def _sharing(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Returns the layers that share weights with others, together, and then each of the others.

    The largest of them first: where the memory for one more is missing, nothing has changed yet.
    """
    uses = Counter(place for layer in layers.values() for place in _places(layer))
    shared = {name: layer for name, layer in layers.items() if any(uses[place] > 1 for place in _places(layer))}
    others = sorted((name for name in layers if name not in shared), key=lambda name: -_size(layers[name]))
    return [shared] * bool(shared) + [{name: layers[name]} for name in others]


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer._parameters.values() if parameter is not None)


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


def _updates(layers: Mapping[str, nn.Module], adapters: tuple[str, ...]) -> Iterator[_Update]:
    """Yields what the adapters add to each weight, a tied weight once."""
    seen: set[object] = set()
    for name, layer in layers.items():
        state = layer_state(layer)
        for tensor in weight_names(state):
            active = [adapter for adapter in adapters if adapter in state.active]
            with standing_still(layer):
                terms = [term for adapter in active for term in terms_of(layer, tensor, adapter)]
            if not terms or _place(layer, tensor) in seen:
                continue
            seen.add(_place(layer, tensor))
            plugin = state.adapters[active[0]].plugin
            weight = state.merged[tensor] if tensor in state.merged else peek_weight(layer, tensor)
            with in_full(weight):
                term = joined(terms) or _dense(terms)
            yield _Update(_full(name, tensor), layer, tensor, plugin, weight, term)


def _full(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}".removeprefix(".")


def _dense(terms: list[Term]) -> Term:
    """Returns one term with the sum of all updates as a matrix."""
    return replace(terms[0], slot=Slot(terms[0].slot.tensor), delta=total(terms))


def _norm(term: Term) -> float:
    """Frobenius norm of an update; that of `scaling * B @ A` from the small products, without forming the matrix.

    `|B A|^2` is the inner product of `B^T B` and `A A^T`. Where they are nearly orthogonal, float32 has too few digits.
    """
    if term.delta is not None:
        return float(torch.linalg.vector_norm(term.delta))
    for dtype in (torch.promote_types(term.A.dtype, torch.float32), torch.float64):
        A, B = term.A.to(dtype), term.B.to(dtype)
        of_A, of_B = linear(A, A), contract(B, B)
        square = float((of_A * of_B).sum())
        if square > _NEARLY_ORTHOGONAL * float(torch.linalg.vector_norm(of_A) * torch.linalg.vector_norm(of_B)):
            break
    return term.scaling * math.sqrt(max(square, 0.0))


def _checked(
    model: nn.Module, layers: Mapping[str, nn.Module], state: ModelState, adapters: tuple[str, ...], max_error: float
) -> MergeReport:
    """Refuses what cannot be merged, before any weight is written."""
    _check(model, layers, state, adapters)
    for layer in layers.values():
        compute_again(layer)
    weights = tuple(MergedWeight(update.name, update.relative_error()) for update in _updates(layers, adapters))
    _refuse_loss(weights, max_error)
    return MergeReport(adapters, weights)


def _check(model: nn.Module, layers: Mapping[str, nn.Module], state: ModelState, adapters: tuple[str, ...]) -> None:
    for name in adapters:
        state.adapter(name)
        if name in state.merged:
            raise StateError(f"The adapter {name!r} is merged already.")
        if name not in state.active:
            raise StateError(f"The adapter {name!r} is not active. Call set_adapter({name!r}) first.")
    variants = [name for name in state.active if state.adapters[name].plan.config.variant != PLAIN]
    if variants and set(state.active) not in (set(adapters), set(state.merged)):
        raise StateError(
            f"The update of a variant ({listing(variants)}) depends on the untouched weight, so all active adapters "
            f"have to be merged at once: {listing(state.active)}."
        )
    for name in () if state.leaving else adapters:  # layers that have left may share a weight with those that have not
        refuse_shared(model, _weights_of(layers, name))


def _weights_of(layers: Mapping[str, nn.Module], adapter: str) -> dict[str, set[str]]:
    """The weights that an adapter updates, by layer name."""
    return {
        name: {slot.tensor for slot in state.adapters[adapter].slots}
        for name, layer in layers.items()
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


def _refuse_loss(weights: Sequence[MergedWeight], max_error: float) -> None:
    unknown = [weight.name for weight in weights if not math.isfinite(weight.relative_error)]
    if unknown:
        raise MergeError(f"{listing(unknown)} or the update has values that are not finite. Nothing was merged.")
    lossy = [weight for weight in weights if weight.relative_error > max_error]
    if lossy:
        worst = max(lossy, key=lambda weight: weight.relative_error)
        raise MergeError(
            f"Merging would lose {worst.relative_error:.0%} of the update of {worst.name!r} to rounding, and more than "
            f"{max_error:.0%} in {len(lossy)} of {len(weights)} weights. Convert the model to a wider type first "
            "(model.float()), or allow it with max_error."
        )


def _refuse_unknown(layers: Mapping[str, nn.Module], adapters: tuple[str, ...]) -> None:
    """Refuses weights that are computed in a way that nobody could end."""
    for name, layer in layers.items():
        state = layer_state(layer)
        changing = {slot.tensor for a in adapters if a in state.active for slot in state.adapters[a].slots}
        for tensor in sorted(changing | state.merged.keys()):
            if layer._parameters.get(tensor) is None:
                remover(layer, tensor, _full(name, tensor))
