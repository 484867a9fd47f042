"""What an adapted model carries with it, so that a copy or a pickle of the model is adapted as well."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.adapter.attach import activate, adapter_parameters
from lora_plugins.adapter.gradients import Guards, require_gradient
from lora_plugins.adapter.lifecycle import CALLS, CONDITIONS, Condition
from lora_plugins.adapter.owned_tensors import OwnedTensors
from lora_plugins.adapter.pretrained import save_as_ever, warn_on_save
from lora_plugins.errors import StateError, listing, near
from lora_plugins.inplace import (
    SUFFIX,
    NamedModule,
    factors_of,
    freeze,
    full_name,
    has_statistics,
    hold,
    holders,
    is_frozen,
    is_shard,
    layer_state,
    let_go,
    let_load,
    mix_rows,
    model_modules,
    named_tensors,
    own_mode,
    own_tensor,
    own_tensors,
    state_of,
    thaw,
    unmix_rows,
    unwrapped,
    watch_loading,
)
from lora_plugins.plan import Plan
from lora_plugins.utils import Versions, plain_name

MODEL_STATE = "_lora_model"
"""Attribute of an adapted model that holds its `ModelState`."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model.

    Args:
        plan: What it adapts.
        recipes: By layer name and slot suffix, what its init needs to change the base again.
        fingerprints: Those of the untouched weights that were taken, by full name; see `files.fingerprint`.
        kept: Those of weights as they were before they were moved by hand, by whoever saves them beside the adapter.
    """

    plan: Plan
    recipes: Mapping[tuple[str, str], Mapping[str, Tensor]]
    fingerprints: dict[str, tuple[object, dict[str, float]]] = field(default_factory=dict)
    kept: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """What acts inside a `with` block, in place of the active adapters.

    Args:
        call: The call that opened it.
        adapters: Names of the adapters that act.
        rows: The adapter of each row of a mixed batch; None where all rows have all of them.
    """

    call: str
    adapters: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None


@dataclass(frozen=True)
class Outside:
    """What there is outside of all blocks, and is put back when the last one ends.

    Args:
        versions: The versions of the model's own tensors whose value depends on the active adapter.
        trained: Those of them that require a gradient, by full name.
    """

    versions: Versions
    trained: Mapping[str, Tensor]


@dataclass
class ModelState:
    """All adapters of a model and which of them act.

    Args:
        adapters: The adapters by name.
        active: Those whose update acts, in order; merged ones included.
        weights: What the updates of active adapters are multiplied by, where that is not 1.
        merged: Those of the active ones whose update is in the weights.
        trainable: Whether active adapters are trained.
        kept: The untouched weights while something is merged, by full name.
        values: The model's own tensors that depend on the active adapter.
        requires_grad: Which parameters of the untouched model required a gradient.
        leaving: Whether a merge for good has begun: some layers may have left already.
        blocks: The `with` blocks that are open, the innermost last.
        outside: What the last of them puts back; None while none is open.
        guards: Of the tensors that were frozen.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    trainable: bool = True
    kept: dict[str, Tensor] = field(default_factory=dict)
    values: OwnedTensors = field(default_factory=OwnedTensors)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    leaving: bool = False
    blocks: tuple[Block, ...] = ()
    outside: Outside | None = None
    guards: Guards = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        self.check("copy")
        return {**self.__dict__, "guards": {}}  # a copy has no forward that a backward could follow

    def adapter(self, name: str) -> Adapter:
        """Returns an adapter by name.

        Raises:
            StateError: If there is none of that name.
        """
        if name not in self.adapters:
            raise StateError(f"The model has no adapter {name!r}. {near(name, self.adapters)}")
        return self.adapters[name]

    @property
    def unmerged(self) -> tuple[str, ...]:
        """The active adapters whose update is not in the weights."""
        return tuple(name for name in self.active if name not in self.merged)

    @property
    def acting(self) -> Block:
        """What acts now: the innermost block, or else the active adapters that are not merged."""
        return self.blocks[-1] if self.blocks else Block("", self.unmerged)

    def check(self, call: str) -> None:
        """Consults the table of calls.

        Args:
            call: Name of the call, as `lifecycle.CALLS` has it.

        Raises:
            StateError: If the call is refused in the model's state.
        """
        # Anything that is true or not: torch.compile of torch 2.8 does not know `bool` of a tuple.
        holds: Mapping[Condition, object] = {
            "leaving": self.leaving,
            "in a block": self.blocks,
            "in a mixed batch": self.acting.rows is not None,
            "merged": self.merged,
        }
        for condition, message in CONDITIONS.items():
            if holds[condition] and condition in CALLS[call].refused:
                block = f"{self.blocks[-1].call}()" if self.blocks else ""
                raise StateError(message.format(doing=CALLS[call].doing, block=block, merged=listing(self.merged)))


def model_state(model: nn.Module) -> ModelState | None:
    """Returns the adapters of a model, compiled or not; None if it has none."""
    state: ModelState | None = unwrapped(model).__dict__.get(MODEL_STATE)
    return state


def present_state(model: nn.Module) -> ModelState:
    """Returns the adapters of a model that had some.

    Raises:
        StateError: If it has none any more.
    """
    state = model_state(model)
    if state is None:
        raise StateError("The model has no adapter any more: it was unloaded. Make a new LoraModel.")
    return state


def open_state(model: nn.Module) -> ModelState:
    """Returns the adapters of a model, after giving it an empty set of them if it has none.

    Raises:
        StateError: If it lies in an adapted model or has one in it: a layer would have two sets of adapters.
    """
    model = unwrapped(model)
    state = model_state(model)
    if state is None:
        _check_not_nested(model)
        parameters = own_tensors(model_modules(model), "_parameters")
        state = ModelState(requires_grad={name: p.requires_grad for name, p in parameters.items()})
        model.__dict__[MODEL_STATE] = state
        model.register_load_state_dict_pre_hook(_accept_base_checkpoint)  # type: ignore[no-untyped-call]
        model.register_forward_pre_hook(_check_training)
        warn_on_save(model, partial(_acting_names, state))
        for module in model.modules():
            hold(module)
            if module is not model:
                watch_loading(model, module, _accept_base_of_part)
    return state


def _check_not_nested(model: nn.Module) -> None:
    inner = [entry.name for entry in model_modules(model) if model_state(entry.module) is not None]
    if inner:
        raise StateError(
            f"{listing(inner)} in this model {'has' if len(inner) == 1 else 'have'} a LoraModel already. Give the "
            "whole model one, or its parts, side by side; unload() takes adapters off."
        )
    if any(state_of(module) is not None for module in model.modules()):
        raise StateError(
            "This model is a part of an adapted one, and shares its layers. Use the LoraModel of that one; unload() "
            "takes its adapters off."
        )


def close_state(model: nn.Module) -> None:
    """Removes the set of adapters of a model, whose layers have none any more."""
    model = unwrapped(model)
    state = model_state(model)
    assert state is not None
    _remove_hook(model._load_state_dict_pre_hooks, _accept_base_checkpoint)
    _remove_hook(model._forward_pre_hooks, _check_training)
    save_as_ever(model)
    modules = model_modules(model)
    for entry in modules:
        thaw(entry.module)
    for module in model.modules():
        let_go(module)
        let_load(module)
    for name, parameter in own_tensors(modules, "_parameters").items():
        required = state.requires_grad.get(name, parameter.requires_grad)
        require_gradient(parameter, required, state.guards, name)
    del model.__dict__[MODEL_STATE]


def _acting_names(state: ModelState) -> tuple[str, ...]:
    return state.acting.adapters


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that have an adapter, by name."""
    return _adapted(model_modules(model))


def _adapted(modules: list[NamedModule]) -> dict[str, nn.Module]:
    return {entry.name: entry.module for entry in modules if state_of(entry.module) is not None}


def check_complete(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Checks that an adapter is on all of its layers.

    Raises:
        StateError: If one of them is not there any more, and with it its update.
    """
    _places(model, state, adapter)


def check_in_place(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Checks that an adapter is on all of its layers, where they were when it was added.

    Raises:
        StateError: If one of them is not there any more, or has another name.
    """
    moved = {name: place for name, place in _places(model, state, adapter).items() if name != place}
    if moved:
        name, place = next(iter(moved.items()))
        raise StateError(
            f"{len(moved)} of the layers of the adapter {adapter!r} have other names than when it was added, such as "
            f"{name!r}, which is {place!r} now. Put them back, or add an adapter when they are in place."
        )


def _places(model: nn.Module, state: ModelState, adapter: str) -> dict[str, str]:
    """Returns the names that the layers of an adapter have now, by those that they had when it was added."""
    layers = {name: layer_state(layer) for name, layer in adapted_layers(model).items()}
    places = {layer.name: name for name, layer in layers.items() if adapter in layer.adapters}
    lost = [layer.name for layer in state.adapters[adapter].plan.layers if layer.name not in places]
    if lost:
        raise StateError(
            f"The update of {listing(lost)} by the adapter {adapter!r} is gone: the layer was replaced. Put it back, "
            "or take the adapter off: unload()."
        )
    return places


def check_norms(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Checks that the norms which stand still are those of the base.

    Raises:
        StateError: If others have taken their places.
    """
    modules, still = model_modules(model), _still_norms(state)
    moving = [e.name for e in modules if e.name in still and has_statistics(e.module) and not is_frozen(e.module)]
    if moving:
        raise StateError(
            f"{listing(moving)} took the place of norms that stand still for the adapter {adapter!r}, and their "
            "statistics, which it does not hold, may have moved. Replace norms before adapters are added, as by "
            "convert_sync_batchnorm, or let them move: norm='track'."
        )


def trained_besides(model: nn.Module, state: ModelState) -> list[str]:
    """Returns the names of parameters that somebody has made require a gradient, and that no adapter holds."""
    held = {name for adapter in state.adapters.values() for name in adapter.plan.trained}
    own = own_tensors(model_modules(model), "_parameters")
    return [name for name, parameter in own.items() if parameter.requires_grad and name not in held]


def apply_state(model: nn.Module, state: ModelState) -> None:
    """Makes layers, values, norm statistics and gradients what the state says, outside of blocks."""
    modules = model_modules(model)
    state.values.activate(model, state.active, lasting=True)
    let_act(modules, state)
    _apply_gradients(modules, state)


def let_act(modules: list[NamedModule], state: ModelState) -> None:
    """Makes layers and norm statistics what acts now, in a block or outside."""
    acting = state.acting
    for entry in modules:
        unmix_rows(entry.module)
    for layer in _adapted(modules).values():
        activate(layer, acting.adapters, acting.rows, {} if state.blocks else state.weights)
        layer_state(layer).meanwhile = "in a block" if state.blocks else "merged" if state.merged else ""
    _apply_norms(modules, state)
    if acting.rows is not None:
        mix_rows(
            own_holders(modules, state, acting.adapters), acting.rows, _own_values(modules, state, acting.adapters)
        )


def own_holders(modules: list[NamedModule], state: ModelState, adapters: tuple[str, ...]) -> dict[str, nn.Module]:
    """Returns the modules that hold a tensor of which one of some adapters has its own value, by name."""
    own = _own_values(modules, state, adapters)
    return holders({entry.name: entry.module for entry in modules}, {key for values in own.values() for key in values})


def _own_values(
    modules: list[NamedModule], state: ModelState, adapters: tuple[str, ...]
) -> dict[str | None, dict[int, Tensor]]:
    """Returns the own values of adapters, by the identity of the model's tensors."""
    tensors = own_tensors(modules, "_parameters") | own_tensors(modules, "_buffers")
    own = {name: state.values.of(name) for name in adapters}
    return {
        name: {id(tensors[key]): values[key].to(tensors[key].device) for key in values}
        for name, values in own.items()
        if values
    }


@contextmanager
def base_in_place(model: nn.Module, state: ModelState) -> Iterator[None]:
    """Puts the base's values of the model's own tensors in place for the time of the block."""
    state.values.activate(model, ())
    try:
        yield
    finally:
        state.values.activate(model, _owners(state))


def _owners(state: ModelState) -> tuple[str, ...]:
    """The adapters whose values of the model's own tensors are in place."""
    return () if state.blocks else state.active


def hold_norms(model: nn.Module) -> None:
    """Keeps norms still as well that have taken the place of those which stand still."""
    _apply_norms(model_modules(model), present_state(model))


def _still_norms(state: ModelState) -> set[str]:
    frozen = [set(state.adapters[name].plan.frozen_norms) for name in _owners(state) or state.adapters]
    return set.intersection(*frozen) if frozen else set()


def _apply_norms(modules: list[NamedModule], state: ModelState) -> None:
    keep = _still_norms(state)
    for entry in modules:
        if entry.name in keep:
            freeze(entry.module)
        else:
            thaw(entry.module)


def _apply_gradients(modules: list[NamedModule], state: ModelState) -> None:
    trained = state.unmerged if state.trainable else ()
    names = {name for adapter in trained for name in state.adapters[adapter].plan.trained}
    for name, parameter in own_tensors(modules, "_parameters").items():
        require_gradient(parameter, name in names, state.guards, name)
    for name, layer in _adapted(modules).items():
        for adapter in state.adapters:
            for factor in adapter_parameters(layer, adapter):
                require_gradient(factor, adapter in trained, state.guards, full_name(name, adapter))


def _accept_base_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a state dict of the untouched model load strictly: adapters that it does not mention keep their values."""
    state = model_state(model)
    if state is None:
        return
    state.check("load_state_dict")
    tensors = {prefix + key: tensor for key, tensor in factors_of(model).items()}
    if not tensors.keys() & state_dict.keys():
        own = (key for key in state_dict if key.startswith(prefix))
        _take_base(model, state, state_dict, {key: plain_name(key.removeprefix(prefix)) for key in own})
        state_dict.update(tensors)
    _forget_fingerprints(model, state)


def _accept_base_of_part(model: nn.Module, part: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Does the same for a state dict of a part of the untouched model."""
    state = model_state(model)
    if state is None:
        return
    state.check("load_state_dict")
    (path, *_) = [name for name, each in model.named_modules(remove_duplicate=False) if each is part]
    _take_base(model, state, state_dict, {key: plain_name(full_name(path, key)) for key in state_dict})
    state_dict.update({prefix + key: tensor for key, tensor in factors_of(part).items()})
    _forget_fingerprints(model, state)


def _take_base(model: nn.Module, state: ModelState, state_dict: dict[str, Any], names: Mapping[str, str]) -> None:
    """Lets a state dict of the base keep what adapters have their own values of, whose names its keys are given."""
    known = {name: state_dict[key] for key, name in names.items()}
    _check_unchanged(state, {*known, *_first_names(model, known)})
    _keep_owned(model, state, known)
    state_dict.update({key: known[name] for key, name in names.items()})


def _first_names(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yields the names that the model calls tensors by, which may be shared, of any names of them."""
    own = {id(tensor): name for name, tensor in named_tensors(model).items()}
    every = named_tensors(model, aliases=True)
    yield from (own[id(every[name])] for name in names if name in every)


def _forget_fingerprints(model: nn.Module, state: ModelState) -> None:
    if not any(is_shard(layer, name) for layer in adapted_layers(model).values() for name in layer._parameters):
        for adapter in state.adapters.values():
            adapter.fingerprints.clear()  # of the base that was


def _check_unchanged(state: ModelState, names: Collection[str]) -> None:
    """Refuses a base for adapters whose init has changed the base."""
    for name, adapter in state.adapters.items():
        owned, stored = state.values.of(name), tuple(f"{key}{SUFFIX}." for key in adapter.plan.stored)
        if adapter.plan.init.changes_base and any(key in owned or key.startswith(stored) for key in names):
            raise StateError(
                f"The adapter {name!r} was started by {adapter.plan.init.name!r}, which changed the base; another base "
                "would undo that. Load the base before the adapter is added, or take it off first: unload()."
            )


def _keep_owned(model: nn.Module, state: ModelState, values: dict[str, Any]) -> None:
    """Gives a base's heads, biases and statistics to the base, where an adapter has its own in their place."""
    named = named_tensors(model, aliases=True)
    state.values.follow_casts(model)
    for name in state.values.owner:
        own, base = own_tensor(model, name), state.values.base[name]
        aliases = [alias for alias, tensor in named.items() if tensor is own and alias in values]
        for alias in aliases:  # of a shared tensor the last one counts, as for torch
            if values[alias].shape == own.shape:
                state.values.base[name] = values[alias].detach().to(base.device, base.dtype, copy=True)
                values[alias] = own.detach()


def _check_training(model: nn.Module, _: Any) -> None:
    state = model_state(model)
    if state is not None and own_mode(model) and (torch.is_grad_enabled() or state.acting.rows is not None):
        state.check("train")


def _remove_hook(hooks: dict[int, Any], function: Any) -> None:
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is function:
            del hooks[key]
