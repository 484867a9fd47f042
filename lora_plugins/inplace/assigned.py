"""Refuses to replace or reset the weights of an adapted layer, as fusing a norm into them does.

Reading such a weight gives `W + ΔW`, and writing it would set `W`: the update would count twice.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lora_plugins.errors import StateError, listing
from lora_plugins.inplace.layer_state import layer_state
from lora_plugins.inplace.library_weights import as_its_own
from lora_plugins.inplace.placed_weights import is_placed
from lora_plugins.inplace.shards import is_distributed
from lora_plugins.inplace.stored_class import resting_class
from lora_plugins.inplace.weight_hooks import weight_hooks
from lora_plugins.inplace.weights import LostWeightError, raw_weight

RESETS = ("reset_parameters", "_reset_parameters")
"""Methods by which layers of torch reset their weights."""

_SAVING = ("_save_to_state_dict", "get_extra_state", "__getstate__")
"""Methods that read what a layer holds, to save or copy it; torch's own read parameters, others may attributes."""

_PARAMETRIZING = {each.__code__: each.__name__ for each in (register_parametrization, remove_parametrizations)}
"""Functions of torch that take the weight that they read for the base's own: their names, by code object."""


def guards(base: Any, weights: tuple[str, ...]) -> dict[str, Any]:
    """Returns the methods for the class of adapted layers that refuse to replace its weights."""
    own = [name for name in _SAVING if getattr(base, name) is not getattr(nn.Module, name)]
    return {
        **{name: _on_the_base(name) for name in (*own, "_load_from_state_dict")},
        **{name: _refused(name, weights) for name in RESETS if hasattr(base, name)},
        "state_dict": _state_dict(base),
        "register_parameter": _register_parameter(weights),
        "register_buffer": _register_buffer(base),
        "parametrizations": _parametrizations(weights),
    }


def _register_parameter(weights: tuple[str, ...]) -> Callable[..., None]:
    def register_parameter(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
        replaced = layer._parameters.get(name)
        if name in weights and (any(map(is_distributed, (replaced, param))) or is_placed(within=4)):
            layer._parameters[name] = param  # as FSDP2 does where no class has its own __setattr__
            return
        if name in weights and replaced is not None:  # others who shard parameters delete the old one first
            refuse_assignment(layer, name)
        for weight in weights:
            _check_original(layer, weight, name, param)
        nn.Module.register_parameter(layer, name, param)

    return register_parameter


def _register_buffer(base: Any) -> Callable[..., None]:
    def register_buffer(layer: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        refuse_while_merged(layer, name, tensor)
        base.register_buffer(layer, name, tensor, persistent)

    return register_buffer


def _parametrizations(weights: tuple[str, ...]) -> property:
    def get(layer: nn.Module) -> Any:
        # Both functions ask first, by is_parametrized(), whether there are some, and write before they do anything else
        # that can be noticed.
        asking = None if torch.compiler.is_compiling() else sys._getframe(1).f_back
        if asking is not None and asking.f_code in _PARAMETRIZING:
            call = _PARAMETRIZING[asking.f_code]
            raise StateError(_refusal(layer, listing(weights), f"changed by {call}(). Call it for"))
        return nn.Module.__getattr__(layer, "parametrizations")

    return property(get)


def _state_dict(base: Any) -> Callable[..., Any]:
    def state_dict(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        others = layer._state_dict_hooks or layer._state_dict_pre_hooks or base.state_dict is not nn.Module.state_dict
        return (_state_dict_on_the_base if others else base.state_dict)(layer, *args, **kwargs)

    return state_dict


def _on_the_base(method: str) -> Callable[..., Any]:
    """Returns a method that runs on the base's own weights."""

    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with as_its_own(layer, resting_class(layer)):
            return getattr(layer, method)(*args, **kwargs)

    return run


_state_dict_on_the_base = _on_the_base("state_dict")


def refuse_assignment(layer: nn.Module, name: str) -> NoReturn:
    """Refuses to assign a weight.

    Raises:
        StateError: Always.
    """
    raise StateError(_refusal(layer, repr(name), "assigned. Assign"))


def refuse_while_merged(layer: nn.Module, name: str, value: Tensor | None) -> None:
    """Refuses another value of a weight that is no parameter, while the layer answers with what was merged into it.

    Hooks and forwards that compute a weight from parameters assign the same one each time, except for rounding once the
    model was cast or moved.

    Raises:
        StateError: If the value is another one.
    """
    state = layer_state(layer)
    if name not in state.merged or torch.compiler.is_compiling():
        return
    if any(hook.weight == name for hook in weight_hooks(layer)):  # spectral norm moves it, in training
        return
    if not isinstance(value, Tensor) or not _is_same(value, raw_weight(layer, name)):
        raise StateError(
            f"{name!r} of {state.name!r} is no parameter, and was assigned another value while an adapter is merged "
            "into the one that it had. Call unmerge_adapter() first."
        )


def refuse_removal_while_merged(layer: nn.Module, name: str) -> None:
    """Refuses to remove a weight that a hook computes, as removing the hook does, while an adapter is merged into it.

    Raises:
        StateError: If one is.
    """
    state = layer_state(layer)
    if name in state.merged:
        raise StateError(
            f"{name!r} of {state.name!r} is computed by a hook, which cannot be removed while an adapter is merged "
            "into the weight. Call unmerge_adapter() first."
        )


def _is_same(value: Tensor, raw: Tensor) -> bool:
    """Whether two weights differ by rounding only."""
    if value.shape != raw.shape or value.is_meta or raw.is_meta:
        return False
    error = 8 * max(torch.finfo(each.dtype).eps for each in (value, raw))
    difference = (value - raw.to(value)).abs().max()
    return bool(difference <= error * raw.abs().max().to(difference))


def _check_original(layer: nn.Module, weight: str, name: str, value: Any) -> None:
    """Refuses pruning, weight norm and spectral norm, which would compute the weight from now on.

    Pruning registers a tensor of its own before it removes the parameter, `weight_norm` and `spectral_norm` of
    `torch.nn.utils` after that.
    """
    if name == f"{weight}_orig" and not isinstance(value, nn.Parameter):
        raise StateError(_refusal(layer, repr(weight), "pruned. Prune"))
    gone = layer._parameters.get(weight) is None and weight not in layer.__dict__
    if gone and name in (f"{weight}_g", f"{weight}_orig"):
        raise LostWeightError(layer, weight)


def _refused(method: str, weights: tuple[str, ...]) -> Callable[..., None]:
    def refuse(layer: nn.Module, *_: Any, **__: Any) -> None:
        raise StateError(_refusal(layer, listing(weights), f"made anew by {method}(). Call it for"))

    refuse.__name__ = method
    return refuse


def _refusal(layer: nn.Module, what: str, done: str) -> str:
    state = layer_state(layer)
    return (
        f"{what} of {state.name!r} is what the base and {listing(state.active or state.adapters)} give together, so it "
        f"cannot be {done} the base's own inside disable_adapter(), or make what it is now the base's with "
        "merge_and_unload()."
    )
