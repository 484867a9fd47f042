"""Layers whose own forward may write into its weight, as masked convolutions do: one effective weight for each call.

Each reading of the weight of an adapted layer makes a new tensor, so what `self.weight.data *= self.mask` writes would
be gone at the next reading. Inside one call of a forward, all readings give the same tensor, until another one is
assigned, as by layers that compute a weight which is no parameter. Forwards of torch itself never write, so they
read the weight anew each time.
"""

import functools
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.inplace.base_reads import check_reads
from lora_plugins.inplace.layer_state import layer_state, state_of

Held = tuple[dict[str, Tensor | None], bool, bool]
"""The weights that a call has read, by name; whether it records gradients, and whether it is one of a forward.

None is for one that was assigned after it was read. The first reading may be inside of `torch.no_grad()`, where the
forward writes. What others write would be lost.
"""


_COMPILED = 0
"""Stands for a thread where a compiled forward runs; a part of it that breaks the graph may read weights uncompiled."""


def is_of_torch(base: type[nn.Module]) -> bool:
    """Whether the forward of a class is torch's own: none of these writes into weights."""
    module = base.forward.__module__ or ""  # None of what was made by exec, as torch.fx does
    return module.partition(".")[0] == "torch"


def holding(base: type[nn.Module], weights: tuple[str, ...]) -> dict[str, Any]:
    """Returns the methods for the class of adapted layers that let a forward read one tensor for each weight."""
    computes = {} if base.train is nn.Module.train else {"train": _train(base)}  # a kernel for forwards of eval mode
    return {"forward": _forward(base), "__setattr__": _set_attribute(base, weights), **computes}


def _train(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.train)
    def train(layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        state, thread = state_of(layer), _thread()
        if state is None or thread in state.held:
            return base.train(layer, *args, **kwargs)
        given: dict[str, Tensor | None] = {}
        state.held[thread] = given, torch.is_grad_enabled(), False
        try:
            return base.train(layer, *args, **kwargs)
        finally:
            del state.held[thread]
            has_read = given.keys() >= set(state.weight_names)
            state.is_kept = not layer.training and (has_read or state.is_kept)

    return train


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)  # others ask for its signature
    def forward(layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        state, thread = state_of(layer), _thread()
        if state is None or thread in state.held:  # a hook of others has kept this method, or it calls itself
            return base.forward(layer, *args, **kwargs)
        given: dict[str, Tensor | None] = {}
        state.held[thread] = given, torch.is_grad_enabled(), True
        try:
            output = base.forward(layer, *args, **kwargs)
        finally:
            del state.held[thread]
        if not (state.is_read or state.is_kept or torch.compiler.is_compiling()):
            check_reads(layer, given, (*args, *kwargs.values()), output)
        return output

    return forward


def _set_attribute(base: type[nn.Module], weights: tuple[str, ...]) -> Callable[[nn.Module, str, Any], None]:
    def set_attribute(layer: nn.Module, name: str, value: Any) -> None:
        if name not in weights:
            base.__setattr__(layer, name, value)
            return
        given, _, is_forward = _running(layer) or ({}, False, False)
        was_read = name in given
        if is_forward and was_read and given[name] is value:  # `self.weight *= self.mask` has written already
            return
        base.__setattr__(layer, name, value)
        if was_read:
            given[name] = None
        else:
            given.pop(name, None)  # torch itself reads a buffer when one is assigned

    return set_attribute


def held(layer: nn.Module, name: str, make: Callable[[nn.Module, str], Tensor]) -> Tensor:
    """Returns the weight that the running forward has read before, or else a new one that `make` gives."""
    now = _running(layer)
    if now is None:
        state = layer_state(layer)
        if state.held and torch.compiler.is_dynamo_compiling():  # the forward has a compiled part: it knows no threads
            state.is_read = True
        return make(layer, name)
    weights, with_gradients, _ = now
    weight = weights.get(name)
    if weight is None:
        with torch.set_grad_enabled(with_gradients):
            weight = weights[name] = make(layer, name)
    return weight


def _running(layer: nn.Module) -> Held | None:
    """Returns what the running call of a layer has read; None outside of one."""
    calls = layer_state(layer).held
    return (calls.get(_thread()) or calls.get(_COMPILED)) if calls else None


def _thread() -> int:
    return _COMPILED if torch.compiler.is_dynamo_compiling() else get_ident()  # which cannot be traced
