"""An adapted layer: the user's own module, of a subclass of its own class that answers with the updated weight.

Nothing is wrapped. The layer keeps its parameters and their names, `lora_A` and `lora_B` join them, and its class
becomes one that is generated once for each base class. Reading `layer.weight` gives `W + ΔW` while an adapter is
active, so the layer's own forward, and anyone else who reads the weight, computes the law.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.plugins.layer import BranchUse, LayerPlugin, Slot, Term, Updates, add_update, joined, total
from lora_plugins.plugins.variant import VariantPlugin
from lora_plugins.utils.autocast import in_full

STATE = "_lora"
"""Attribute of an adapted layer that holds its `LayerState`."""


class AdapterTensors(nn.Module):
    """The tensors of one factor of a layer, by adapter name; any name that a parameter can have is allowed."""

    def __getitem__(self, adapter: str) -> nn.Parameter:
        # Where FSDP has put a whole tensor in a parameter's place, for the time of a forward, it is an attribute.
        parameter = self._parameters.get(adapter)
        return cast(nn.Parameter, self.__dict__[adapter] if parameter is None else parameter)

    def __setitem__(self, adapter: str, value: nn.Parameter) -> None:
        # Not register_parameter, which refuses names of methods such as "half".
        self._parameters[adapter] = value

    def __delitem__(self, adapter: str) -> None:
        del self._parameters[adapter]

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._parameters

    def __len__(self) -> int:
        return len(self._parameters)

    def extra_repr(self) -> str:
        """Shows the adapters and the shape of their factors."""
        return ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter on one layer.

    Args:
        plugin: The plugin whose matrix view the factors have.
        branch_use: When the plugin's branch may replace the layer's own forward.
        slots: Where its updates go.
        r: Rank.
        alpha: Numerator of the scaling.
        scaling: Factor of `B @ A`.
        dropout: Probability of dropping an element of the branch's input during training.
        low_memory: Whether the branch computes its input again in the backward where it can.
        variant: How A and B change the weight; None for plain LoRA.
    """

    plugin: LayerPlugin
    branch_use: BranchUse
    slots: tuple[Slot, ...]
    r: int
    alpha: float
    scaling: float
    dropout: float
    low_memory: bool
    variant: VariantPlugin | None


@dataclass(frozen=True)
class Branch:
    """How the active updates of a layer are computed in place of its own forward.

    Args:
        plugin: Whose branch it is.
        always: Whether it replaces the forward always, or only while dropout acts.
        drops: Whether an update has dropout.
        tensors: Attribute names of the weights.
        updates: Name, adapter and slot of each active update.
    """

    plugin: LayerPlugin
    always: bool
    drops: bool
    tensors: tuple[str, ...]
    updates: tuple[tuple[str, LayerAdapter, Slot], ...]

    def acts(self, training: bool) -> bool:
        """Whether it replaces the forward, in training mode or not."""
        return self.always or (training and self.drops)


@dataclass
class LayerState:
    """What an adapted layer knows of its adapters.

    Args:
        name: Full name of the layer in the model, for messages.
        base_class: The class of the untouched layer.
        adapters: All adapters on the layer, active or not.
        active: Names of those whose update is added at each forward.
        merged: Weights with merged updates that are not written into a parameter: since something computes them, or
            not yet.
        branch: What computes the active updates, if not the layer's own forward.
        rows: While rows of one batch have adapters of their own: the adapter of each, None for the base.
    """

    name: str
    base_class: type[nn.Module]
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: dict[str, Tensor] = field(default_factory=dict)
    branch: Branch | None = None
    rows: tuple[str | None, ...] | None = None

    @property
    def has_branch(self) -> bool:
        """Whether some adapter of the layer has a branch."""
        return any(adapter.branch_use != "never" for adapter in self.adapters.values())

    def active_slots(self) -> Iterator[tuple[str, LayerAdapter, Slot]]:
        """Yields name, adapter and slot of each active update."""
        for name in self.active:
            adapter = self.adapters[name]
            for slot in adapter.slots:
                yield name, adapter, slot


class AdaptedLayer(nn.Module):
    """What generated classes have in common; comes before the base class in their MRO."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no import path; it is made again from its base class.
        state = layer_state(self)
        return _rebuild, (state.base_class, weight_names(state), state.has_branch), self.__dict__

    def extra_repr(self) -> str:
        """Adds the adapters to what the base class shows."""
        adapters = ", ".join(f"{name}: r={a.r}, alpha={a.alpha:g}" for name, a in layer_state(self).adapters.items())
        return f"{super().extra_repr()}, lora[{adapters}]".removeprefix(", ")


def state_of(layer: nn.Module) -> LayerState | None:
    """Returns the adapter state of a layer; None if it is not adapted."""
    state: LayerState | None = layer.__dict__.get(STATE)  # not a cast: torch.compile of 2.8 knows no `X | None`
    return state


def layer_state(layer: nn.Module) -> LayerState:
    """Returns the adapter state of an adapted layer."""
    return cast(LayerState, layer.__dict__[STATE])


def base_class_of(layer: nn.Module) -> type[nn.Module]:
    """Returns the class that a layer has without its adapters."""
    state = state_of(layer)
    return type(layer) if state is None else state.base_class


def weight_names(state: LayerState) -> tuple[str, ...]:
    """Returns the attribute names of the weights that some adapter of a layer updates."""
    names = {slot.tensor: None for adapter in state.adapters.values() for slot in adapter.slots}
    return tuple(names)


def base_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the untouched weight: a parameter, or what a parametrization or a hook of the layer computes."""
    for store in (layer._parameters, layer._buffers, layer.__dict__):
        value = store.get(name)
        if value is not None:
            return cast(Tensor, value)
    return cast(Tensor, getattr(base_class_of(layer), name).fget(layer))


def peek_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the untouched weight, detached, without letting a parametrization move its own statistics."""
    with standing_still(layer), torch.no_grad():
        return base_weight(layer, name).detach()


@contextmanager
def standing_still(layer: nn.Module) -> Iterator[None]:
    """Keeps what computes a layer's weights from moving statistics of its own, as spectral norm does in training."""
    parametrizations = layer._modules.get("parametrizations")
    modules = [layer, *(parametrizations.modules() if parametrizations else ())]
    moving = [module for module in modules if module.training]
    for module in moving:
        module.training = False
    try:
        yield
    finally:
        for module in moving:
            module.training = True


def weight_key(layer: nn.Module, name: str) -> int | None:
    """Identifies the parameter behind a weight, the same for all layers that share it; None if it is computed."""
    parameter = layer._parameters.get(name)
    return None if parameter is None else id(parameter)


def resting_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the weight that active updates are added to: the untouched one, or one with merged updates in it."""
    merged = layer_state(layer).merged.get(name)
    return base_weight(layer, name) if merged is None else merged


def factors(layer: nn.Module, adapter: str, slot: Slot) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A and B of one slot of one adapter."""
    modules = layer._modules
    A, B = modules[f"lora_A{slot.suffix}"], modules[f"lora_B{slot.suffix}"]
    return cast(AdapterTensors, A)[adapter], cast(AdapterTensors, B)[adapter]


def update(layer: nn.Module, name: str, adapter: str, shape: torch.Size) -> Tensor | None:
    """Returns `scaling * B @ A` of one adapter, laid out like the weight called `name`; None if it has none there.

    Args:
        layer: An adapted layer.
        name: Attribute name of the weight.
        adapter: Name of the adapter.
        shape: Shape of the weight.
    """
    terms = terms_of(layer, name, adapter)
    if not terms:
        return None
    return layer_state(layer).adapters[adapter].plugin.from_matrix(total(terms), shape)


def terms_of(layer: nn.Module, name: str, adapter: str) -> list[Term]:
    """Returns the updates of one adapter to the weight called `name`, without dropout; none if it has none there."""
    spec = layer_state(layer).adapters.get(adapter)
    slots = [slot for slot in spec.slots if slot.tensor == name] if spec else []
    return [_term(layer, adapter, spec, slot, 0.0) for slot in slots if spec]


def own_tensors_of(layer: nn.Module, adapter: str, slot: Slot) -> dict[str, nn.Parameter]:
    """Returns the tensors of one slot of one adapter that are its variant's own, by name."""
    variant = layer_state(layer).adapters[adapter].variant
    if variant is None:
        return {}
    A, B = factors(layer, adapter, slot)
    names = variant.shapes(len(B), A.shape[1], len(A))
    return {name: cast(AdapterTensors, layer._modules[f"lora_{name}{slot.suffix}"])[adapter] for name in names}


def _term(layer: nn.Module, adapter: str, spec: LayerAdapter, slot: Slot, dropout: float) -> Term:
    A, B = factors(layer, adapter, slot)
    delta = None
    if spec.variant is not None:
        own = own_tensors_of(layer, adapter, slot)
        weight = slot.cut(spec.plugin.to_matrix(base_weight(layer, slot.tensor))).to(A.dtype)
        with in_full(weight):
            delta = spec.variant.update(weight, A, B, spec.scaling, own)
    return Term(slot, A, B, spec.scaling, dropout, spec.low_memory, delta)


def is_shard(layer: nn.Module, name: str) -> bool:
    """Whether FSDP or FSDP2 holds a weight in parts, as both do outside of the layer's forward.

    They take their parts by `getattr(layer, name)` and keep what they get: that has to be the parameter.
    """
    parameter = layer._parameters.get(name)
    if "_is_fsdp_managed_module" in layer.__dict__:  # what FSDP says of all modules below it
        return parameter is not None or layer.__dict__[name].untyped_storage().size() == 0
    return hasattr(parameter, "placements")  # of a DTensor, whose import is too slow for those who do not use it


def updated_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns `W + ΔW` over the active adapters; of a weight that is split over processes, this one's part of `W`."""
    state = layer_state(layer)
    weight = resting_weight(layer, name)
    if not state.active or is_shard(layer, name):
        return weight
    with in_full(weight):
        return _add_all(layer, name, weight)


def _add_all(layer: nn.Module, name: str, weight: Tensor) -> Tensor:
    state = layer_state(layer)
    for adapter in state.active:
        delta = update(layer, name, adapter, weight.shape)
        if delta is not None:
            weight = add_update(weight, delta)
    return weight


def refresh_class(layer: nn.Module) -> None:
    """Gives a layer the class that fits its state: its own while no update is active, else the generated one."""
    state = layer_state(layer)
    state.branch = _branch_of(state)
    base = cast(Any, state.base_class)
    idle = not state.active and not state.merged
    layer.__class__ = base if idle else adapted_class(base, weight_names(state), state.has_branch)


def _branch_of(state: LayerState) -> Branch | None:
    updates = tuple(state.active_slots())
    uses = {adapter.branch_use for _, adapter, _ in updates}
    if not uses or "never" in uses:
        return None
    return Branch(
        plugin=updates[0][1].plugin,
        always=updates[0][1].branch_use == "always",
        drops=any(adapter.dropout for _, adapter, _ in updates),
        tensors=tuple(dict.fromkeys(slot.tensor for _, _, slot in updates)),
        updates=updates,
    )


@functools.cache
def adapted_class(base: Any, weights: tuple[str, ...], has_branch: bool) -> type[nn.Module]:
    """Generates the class of adapted layers, once for each base class.

    Args:
        base: The class of the untouched layer.
        weights: Attribute names of the weights that answer with their update.
        has_branch: Whether a plugin's branch may replace the base class's forward.
    """
    namespace: dict[str, Any] = {name: _weight_property(name) for name in weights}
    namespace["__module__"] = base.__module__  # torch.fx tells leaf modules of torch by it
    namespace["__doc__"] = base.__doc__
    namespace["__jit_unused_properties__"] = [*getattr(base, "__jit_unused_properties__", []), *weights]
    if has_branch:
        namespace["forward"] = _forward(base)
    return type(f"Lora{base.__name__}", (AdaptedLayer, base), namespace)


def _weight_property(name: str) -> property:
    def get(layer: nn.Module) -> Tensor:
        state = layer_state(layer)
        if state.rows is not None:
            raise StateError(
                f"The weight of {state.name!r} is used by another module without calling the layer, so the rows of a "
                "batch cannot have adapters of their own. Run one batch for each adapter, with set_adapter."
            )
        weight = updated_weight(layer, name)
        if layer.training and weight.requires_grad and any(adapter.dropout for _, adapter, _ in state.active_slots()):
            weight.register_hook(_RefuseDropout(state.name))  # type: ignore[no-untyped-call]
        return weight

    def set(layer: nn.Module, value: Tensor) -> None:
        # Reached by hooks that compute the weight (weight norm, pruning); parameters never come here.
        layer.__dict__[name] = value

    def delete(layer: nn.Module) -> None:
        del layer.__dict__[name]

    return property(get, set, delete)


@dataclass(frozen=True)
class _RefuseDropout:
    """Stops a backward through a weight that was read past the layer's forward, where no dropout can act."""

    layer: str

    def __call__(self, gradient: Tensor) -> None:
        raise StateError(
            f"The weight of {self.layer!r} is used by another module without calling the layer, so dropout cannot "
            "act on it. Set dropout=0, or add the layer to exclude_modules."
        )


def _forward(base: type[nn.Module]) -> Any:
    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        state, training = layer_state(layer), layer.training
        branch = state.branch
        if branch is None or not branch.acts(training):
            return base.forward(layer, *args, **kwargs)
        weights: Mapping[str, Tensor] = {tensor: resting_weight(layer, tensor) for tensor in branch.tensors}
        if state.rows is not None:
            return branch.plugin.mixed(layer, weights, _updates(layer, state, args[0]), *args, **kwargs)
        terms = [
            _term(layer, name, adapter, slot, adapter.dropout if training else 0.0)
            for name, adapter, slot in branch.updates
        ]
        return branch.plugin.branch(layer, weights, terms, *args, **kwargs)

    return forward


def _updates(layer: nn.Module, state: LayerState, x: Tensor) -> Updates:
    """Returns the update of each row of a batch whose rows have adapters of their own."""
    assert state.rows is not None
    if len(x) != len(state.rows):
        raise StateError(
            f"{state.name!r} gets {len(x)} rows for a batch of {len(state.rows)} adapter names. Its first dimension "
            "is no batch, so its rows cannot have adapters of their own. Run one batch for each adapter."
        )
    tensor = state.adapters[state.active[0]].slots[0].tensor
    terms = [cast(Term, joined(terms_of(layer, tensor, name))) for name in state.active]
    index = [state.active.index(row) if row in state.active else len(state.active) for row in state.rows]
    return Updates.stack(terms, torch.tensor(index, device=x.device))


def _rebuild(base: Any, weights: tuple[str, ...], has_branch: bool) -> nn.Module:
    generated = adapted_class(base, weights, has_branch)
    return generated.__new__(generated)
