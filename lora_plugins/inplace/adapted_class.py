"""The class of an adapted layer: a subclass of the layer's own, which answers with the effective weight.

Nothing is wrapped. The layer keeps its parameters and their names, `lora_A` and `lora_B` join them, and its class
becomes one that is generated once for each base class. Reading `layer.weight` gives `W + ΔW` while an adapter is
active, so the layer's own forward, and anyone else who reads the weight, computes the law.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.errors import StateError, noted
from lora_plugins.inplace.assigned import guards, refuse_assignment, refuse_removal_while_merged, refuse_while_merged
from lora_plugins.inplace.by_plugin import by_plugin
from lora_plugins.inplace.called_weight import called_weight, no_dropout
from lora_plugins.inplace.class_cache import once_for_each_class
from lora_plugins.inplace.deltas import effective_weight
from lora_plugins.inplace.described_tensor import DescribedTensor, described
from lora_plugins.inplace.frozen_norm import own_mode, set_class
from lora_plugins.inplace.held_weights import held, holding, is_of_torch
from lora_plugins.inplace.layer_state import base_class_of, constructor, generated_class, layer_state, state_of
from lora_plugins.inplace.library_kinds import Foreign, put_class_back
from lora_plugins.inplace.library_weights import foreign_weights
from lora_plugins.inplace.placed_weights import is_placed
from lora_plugins.inplace.shards import is_kept_in_parts
from lora_plugins.inplace.stored_class import making_again, resting_class, stored_class
from lora_plugins.inplace.stored_weight import stored_weights
from lora_plugins.inplace.weights import LazyWeightsOf, weight_with_merged, weights_of
from lora_plugins.plugins import LayerPlugin


def _reduce(layer: Any, protocol: Any) -> Any:
    # The generated class has no import path; it is made again from its base class.
    return _rebuild, _arguments(layer), layer.__getstate__()


def _unpickled(base: Any, weights: tuple[str, ...]) -> Callable[[Any, dict[str, Any]], None]:
    """Returns a `__setstate__` that gives weights of a layer the class back that pickle took."""

    def set_state(layer: Any, state: dict[str, Any]) -> None:
        base.__setstate__(layer, state)
        for name in weights:
            put_class_back(layer._parameters.get(name))

    return set_state


def _copied(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    twin: nn.Module = memo.setdefault(id(layer), type(layer).__new__(type(layer)))
    twin.__dict__.update(copy.deepcopy(layer.__dict__, memo))  # assigning it would ask the class, which looks into it
    return twin


def _extra_repr(layer: nn.Module) -> str:
    """Adds the adapters to what the base class shows."""
    state = layer_state(layer)
    adapters = ", ".join(f"{name}: r={a.r}, alpha={a.alpha:g}" for name, a in state.adapters.items())
    return f"{resting_class(layer).extra_repr(layer)}, lora[{adapters}]".removeprefix(", ")


def _arguments(layer: nn.Module) -> tuple[Any, ...]:
    """Returns the arguments of `adapted_class` for a layer, whose weights get the class back that pickle took."""
    state = layer_state(layer)
    for name in state.weight_names:
        put_class_back(layer._parameters.get(name))
    kinds = foreign_weights(layer)
    foreign = next((kinds[name] for name in state.weight_names if name in kinds), None)
    stored = tuple(stored_weights(layer))
    return base_class_of(layer), state.weight_names, state.has_branch, state.extended_by, stored, foreign


def refresh_class(layer: nn.Module) -> None:
    """Gives a layer the class that fits its state: its own while no update is active, else the generated one."""
    state = layer_state(layer)
    state.branch = state.active_branch()
    if state.active or state.merged:
        set_class(layer, adapted_class(*_arguments(layer)))
    else:
        rest(layer)


def rest(layer: nn.Module) -> None:
    """Gives an adapted layer the class that it has without adapters; drops what it kept when it had that class last."""
    set_class(layer, resting_class(layer))
    for planned in layer_state(layer).adapters.values():
        with noted(f"forget() of the layer type {planned.plugin.name!r}, for {planned.name!r}"):
            planned.plugin.forget(layer)


@once_for_each_class
def adapted_class(
    base: Any,
    weights: tuple[str, ...],
    has_branch: bool,
    extended_by: type[LayerPlugin[Any]] | None = None,
    stored: tuple[str, ...] = (),
    foreign: Foreign | None = None,
) -> type[nn.Module]:
    """Generates the class of adapted layers, once for each set of arguments, which `_arguments` makes of a layer.

    `weights` are the attributes that answer with their effective value, `stored` those in fewer bytes. With
    `has_branch`, a plugin's branch may replace the forward of the base. `extended_by` is the type of a plugin that has
    attributes for the class, and `foreign` says how another library has quantized one of the weights.
    """
    name, init = base.__name__, constructor(base)
    if stored:
        base = stored_class(base, stored)
    namespace: dict[str, Any] = {name: _weight_property(name, base) for name in weights} | {"__init__": init}
    namespace |= {"__reduce_ex__": _reduce, "extra_repr": _extra_repr, "_apply": _apply_to(base)}
    # torch.fx takes modules of torch whole, by this. What it traces inside of a layer would be constants.
    namespace["__module__"] = base.__module__ if base.__module__.startswith("torch.nn") else "torch.nn"
    namespace["__jit_unused_properties__"] = [*getattr(base, "__jit_unused_properties__", []), *weights]
    namespace |= guards(base, weights)
    if hasattr(base, "__deepcopy__"):  # which may copy the weight that is meant, and no adapter
        namespace["__deepcopy__"] = _copied
    if extended_by is not None:
        namespace |= extended_by.class_attributes
    if has_branch:
        namespace["forward"] = making_again(_forward(base, LazyWeightsOf)) if stored else _forward(base)
    elif weights and not is_of_torch(base):
        namespace |= holding(base, weights)
    if foreign is not None:
        namespace["forward"] = _quantized_forward(base, foreign, has_branch)
        namespace["__setstate__"] = _unpickled(base, weights)
    return generated_class(f"Lora{name}", base, namespace)


def _quantized_forward(base: Any, foreign: Foreign, has_branch: bool) -> Any:
    """Returns the forward of layers whose library reads the quantized weight under the name of the dense one."""
    own = foreign.forward or base.forward
    inner, names = _forward(base, own=own) if has_branch else own, positional_names(base)

    def cast(layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        given, named = by_position(names, args, kwargs)
        if not given:
            return own(layer, **named)  # which says what is missing
        x, *others = given
        weight = layer._parameters[next(iter(foreign_weights(layer)))]
        return inner(layer, x.to(foreign.dtype(layer, weight)), *others, **named).to(x.dtype)

    return making_again(cast if own in (foreign.forward, nn.Linear.forward) else inner)


@once_for_each_class
def class_reason(base: Any) -> str:
    """Returns why a layer of some class cannot be given the class of an adapted one; empty if it can."""
    try:
        object.__new__(base).__class__ = adapted_class(base, (), has_branch=False)
    except Exception as error:  # of whoever wrote the class or its metaclass
        return f"its class {base.__name__} cannot be extended: {error}"
    return ""


def _apply_to(base: Any) -> Callable[..., nn.Module]:
    def apply(layer: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts merged weights that are no parameter along with the parameters."""
        state = layer_state(layer)
        state.merged.update({name: fn(value) for name, value in state.merged.items()})
        applied: nn.Module = base._apply(layer, fn, recurse)
        return applied

    return apply


def _weight_property(name: str, base: Any) -> property:
    def delete(layer: nn.Module) -> None:
        refuse_removal_while_merged(layer, name)
        del layer.__dict__[name]

    return property(_getter(name), _setter(name, base), delete)


def _getter(name: str) -> Callable[[nn.Module], Tensor | DescribedTensor]:
    def get(layer: nn.Module) -> Tensor | DescribedTensor:
        if is_placed() and isinstance(own := layer._parameters.get(name), Tensor):
            return own
        state = layer_state(layer)
        if state.rows is not None and not is_kept_in_parts(layer, name):
            return described(
                weight_with_merged(layer, name),
                f"The weight of {state.name!r} is used by another module without calling the layer, so the rows of a "
                "batch cannot have adapters of their own. Run one batch for each adapter, with set_adapter.",
                layer,
            )
        if _is_traced(layer, name):
            raise StateError(
                f"The weight of {state.name!r} is used by another module without calling the layer, so torch.fx would "
                "trace its present value, and not how it is computed. Merge it first, by merge_and_unload(), or add "
                "the layer to exclude_modules."
            )
        weight = held(layer, name, effective_weight)
        if not torch.compiler.is_compiling() and state.on_read is not None and not state.held:
            state.on_read(name, weight)
        drops = own_mode(layer) and any(planned.settings.dropout for _, planned, _ in state.active_slots())
        if not drops or any(weight is own.get(name) for own in (layer._parameters, layer.__dict__)):
            return weight  # whoever shards or offloads parameters expects the one that the layer has
        # A tensor of torch without values can be of no other class, and compilers run hooks when they are put on.
        if type(weight) is not Tensor or torch.compiler.is_compiling():
            return described(weight, no_dropout(state.name), layer)
        return called_weight(layer, weight)

    return get


def _setter(name: str, base: Any) -> Callable[[nn.Module, Tensor], None]:
    is_computed = isinstance(inspect.getattr_static(base, name, None), property)

    def set(layer: nn.Module, value: Tensor) -> None:
        # Reached by hooks that compute the weight (weight norm, pruning); parameters never come here.
        if is_computed:  # parametrizations would set what they compute from
            refuse_assignment(layer, name)
        refuse_while_merged(layer, name, value)
        layer.__dict__[name] = value

    return set


def _is_traced(layer: nn.Module, name: str) -> bool:
    """Whether torch.fx traces what reads a weight: its tracer gives a proxy for the parameter.

    Tracers of operators, such as that of `make_fx`, give the parameter itself.
    """
    if torch.compiler.is_compiling() or (parameter := layer._parameters.get(name)) is None:
        return False
    return nn.Module.__getattr__(layer, name) is not parameter


def positional_names(base: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of what a layer's own forward takes by position or by keyword, in order."""
    parameters = [*inspect.signature(base.forward).parameters.values()][1:]
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


def by_position(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call by position where possible, as plugins may give them other names.

    The names are those that `positional_names` gives.
    """
    given: list[Any] = [*args]
    named = dict(kwargs)
    for name in names[len(args) :]:
        if name not in named:
            break
        given.append(named.pop(name))
    return tuple(given), named


def _forward(
    base: type[nn.Module],
    read: Callable[..., Mapping[str, Tensor]] = weights_of,
    own: Callable[..., Any] | None = None,
) -> Any:
    names, order, own = positional_names(base), [*inspect.signature(base.forward).parameters], own or base.forward

    @functools.wraps(own)  # others ask for its signature
    def forward(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        state = state_of(layer)
        if state is None:  # it was unloaded after a hook of others had kept this method
            return own(layer, *args, **kwargs)
        branch = state.branch
        if branch is None or not branch.acts(own_mode(layer)):
            return own(layer, *args, **kwargs)
        if kwargs:
            args, kwargs = by_position(names, args, kwargs)
        return by_plugin(layer, branch, read(layer, branch.tensors), args, kwargs, order=order)

    return forward


def _rebuild(*arguments: Any) -> nn.Module:
    generated = adapted_class(*arguments)
    return generated.__new__(generated)
