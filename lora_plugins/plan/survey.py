"""One walk over a model, which records all that planning needs to know of it; see `sites`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.errors import PluginError, listing
from lora_plugins.inplace import (
    NamedModule,
    base_class_of,
    class_reason,
    detached_weight,
    element_count,
    foreign_kind,
    foreign_problem,
    full_name,
    has_statistics,
    model_modules,
    own_parameters,
    persistent_buffers,
    state_of,
    stored_weight,
    stored_weights,
    weight_key,
)
from lora_plugins.plan.other_libraries import foreign_names
from lora_plugins.plan.served import (
    biases_of,
    check_parts,
    check_slots,
    failure,
    matrix_shape,
    parts_of,
    slots_of,
    weight_of,
)
from lora_plugins.plan.sites import OwnParameter, Site, Survey, Weight
from lora_plugins.plugins import LayerPlugin, Registry, Slot, class_path, computes_as


def survey(model: nn.Module, registry: Registry) -> Survey:
    """Walks a model once, adapted already or not; touches nothing."""
    modules = model_modules(model)
    parameters = own_parameters(modules)
    aliases: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for entry in modules:
        for key, parameter in entry.module._parameters.items():
            if parameter is not None:
                aliases.setdefault(id(parameter), []).extend(full_name(name, key) for name in entry.names)
                sizes[id(parameter)] = element_count(entry.module, parameter)
    foreign = foreign_names(modules)
    return Survey(
        tuple(_site(entry, registry, entry.name in foreign) for entry in modules),
        {
            name: _parameter(parameter, sizes[id(parameter)], aliases[id(parameter)][1:])
            for name, parameter in parameters.items()
        },
        tuple(persistent_buffers(modules)),
    )


def _parameter(parameter: Tensor, size: int, aliases: list[str]) -> OwnParameter:
    lazy = is_lazy(parameter)
    floating = parameter.dtype.is_floating_point and foreign_kind(parameter) is None
    return OwnParameter(id(parameter), size, floating, parameter.dtype, lazy, tuple(aliases))


def _site(entry: NamedModule, registry: Registry, foreign: bool) -> Site:
    module = entry.module
    base = base_class_of(module)
    plugin = registry.layer_for(base)
    return Site(
        names=entry.names,
        class_name=base.__name__,
        class_path=class_path(base),
        computes_as=computes_as(base),
        plugin=plugin,
        has_parameters=bool(module._parameters) or bool(stored_weights(module)),
        matrices=tuple(name for name, tensor in module._parameters.items() if _is_matrix(tensor)),
        foreign_adapter=foreign,
        has_statistics=has_statistics(module),
        scripted=isinstance(module, torch.jit.ScriptModule),
        adapted=state_of(module) is not None,
        **({} if plugin is None else {"fixed_class": class_reason(cast(Any, base)), **_served(entry, plugin)}),
    )


def _is_matrix(tensor: Tensor | None) -> bool:
    if tensor is None or is_lazy(tensor) or not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return False
    return sum(size > 1 for size in tensor.shape) > 1


def _served(entry: NamedModule, plugin: LayerPlugin[Any]) -> dict[str, Any]:
    """Returns what a plugin says about a layer; on layers that are never targeted it may fail."""
    try:
        return _answers(entry, plugin)
    except Exception as error:  # a third party's; raised when the layer is targeted
        return {"failure": failure(plugin, entry.names[:1], base_class_of(entry.module).__name__, error)}


def _answers(entry: NamedModule, plugin: LayerPlugin[Any]) -> dict[str, Any]:
    module = entry.module
    slots, parts = slots_of("slots", plugin.slots(module)), parts_of(plugin.parts(module))
    if not slots:
        raise PluginError("slots() names no weight of it")
    every = (*slots, *parts.values())
    weights = {tensor: _weight(entry, plugin, tensor) for tensor in {slot.tensor: None for slot in every}}
    rows = {tensor: weight.shape[0] for tensor, weight in weights.items() if not weight.problem}
    for method, given in {"slots": slots, "parts": tuple(parts.values())}.items():
        check_slots(method, given, rows)
    check_parts(parts)
    return {
        "slots": slots,
        "parts": parts,
        "weights": weights,
        "biases": biases_of(plugin.biases(module)),
        "foreign": _foreign(module, every),
    }


def _weight(entry: NamedModule, plugin: LayerPlugin[Any], tensor: str) -> Weight:
    own, stored = weight_key(entry.module, tensor), stored_weight(entry.module, tensor)
    if stored is not None:
        shape = matrix_shape(plugin, torch.empty(stored.shape, device="meta"), tensor)
        on_meta = stored.device.type == "meta"
        return Weight(id(stored), shape, stored.dtype, on_meta=on_meta, stored=stored.storage)
    kind = foreign_kind(entry.module._parameters.get(tensor))
    foreign, key = "" if kind is None else kind.title, own or (entry.name, tensor)
    if problem := foreign_problem(entry.module, tensor):
        return Weight(key, (1, 1), problem=problem, foreign=foreign, breaks=bool(kind and kind.breaks))
    weight = weight_of(entry.module, tensor, detached_weight)
    problem = _problem(weight)
    shape = (1, 1) if problem else matrix_shape(plugin, weight, tensor)
    problem = problem or _shared(entry.module, tensor) or _read_as_another(entry.module, tensor)
    return Weight(key, shape, weight.dtype, own is None, weight.is_meta, problem, foreign=foreign)


def _problem(weight: Tensor) -> str:
    """Looks at the layout, and tries to add to a type that is not torch's own, as those of quantization libraries."""
    if weight.layout is not torch.strided:
        return f"is {weight.layout}, to which no dense update can be added; make it dense, or exclude the layer"
    if type(weight) in (Tensor, nn.Parameter) or not weight.dtype.is_floating_point:
        return ""
    try:
        with torch.no_grad():
            weight + torch.zeros_like(weight)
    except Exception as error:  # of whoever wrote the type
        return f"is a {type(weight).__name__}, to which nothing can be added ({type(error).__name__}: {error})"
    return ""


def _shared(layer: nn.Module, tensor: str) -> str:
    """Returns a problem if the layer has the parameter under two names: a merge would write two updates, or none."""
    own = layer._parameters.get(tensor)
    others = [name for name, each in layer._parameters.items() if own is not None and each is own and name != tensor]
    return f"is the same parameter as {listing(others)} of this layer; exclude the layer" if others else ""


def _read_as_another(layer: nn.Module, tensor: str) -> str:
    """Returns a problem if reading the weight gives another tensor than the parameter that an update is added to."""
    own = layer._parameters.get(tensor)
    if own is None or type(layer) is not base_class_of(layer) or getattr(layer, tensor) is own:
        return ""
    return (
        "is not what the layer computes with: its class answers with another tensor than the parameter. Exclude the "
        "layer, or let it compute that in its forward, or by a parametrization"
    )


def _foreign(module: nn.Module, slots: Sequence[Slot]) -> tuple[str, ...]:
    if state_of(module) is not None:
        return ()
    names = dict.fromkeys(f"lora_A{slot.suffix}" for slot in slots)
    return tuple(name for name in names if hasattr(module, name))
