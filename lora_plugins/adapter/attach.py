"""Puts adapters on layers and takes them off again."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_plugins.adapter.content import AdapterContent, factor_dtype
from lora_plugins.inplace import (
    STATE,
    AdapterTensors,
    LayerState,
    detached_weight,
    layer_state,
    refresh_class,
    slot_tensors,
    state_of,
    submodule,
)
from lora_plugins.plan import Plan
from lora_plugins.plugins import PlannedLayer, Slot
from lora_plugins.utils import plain_name


def attach(model: nn.Module, plan: Plan, adapter: str, content: AdapterContent) -> None:
    """Puts an adapter on its layers, not yet active."""
    for layer in plan.layers:
        module = submodule(model, layer.name)
        _add(module, layer, adapter)
        for slot in layer.slots:
            tensors = content[layer.name, slot.suffix]
            weight = detached_weight(module, slot.tensor)
            for factor, value in {"A": tensors.A, "B": tensors.B, **tensors.own}.items():
                # A copy: whoever holds the value may load it again, and autograd would refuse one of inference mode.
                tensor = value.to(weight.device, factor_dtype(weight), copy=True)
                _container(module, factor, slot)[adapter] = nn.Parameter(tensor, requires_grad=False)
        for tie in layer.ties:
            other, tied = submodule(model, tie.layer), layer.tied(tie)
            _add(other, tied, adapter)
            sources = [slot for slot in layer.slots if slot.tensor == tie.source]
            for slot, source in zip(tied.slots, sources, strict=True):
                for factor, parameter in slot_tensors(module, adapter, source).items():
                    _container(other, factor, slot)[adapter] = parameter


def detach(layer: nn.Module, adapter: str) -> None:
    """Takes an adapter that is not active off a layer; without any other the layer is what it was."""
    state = layer_state(layer)
    tensors = {slot: slot_tensors(layer, adapter, slot) for slot in state.adapters[adapter].slots}
    del state.adapters[adapter]
    for slot, names in tensors.items():
        for factor in names:
            container = _container(layer, factor, slot)
            del container[adapter]
            if not len(container):
                del layer._modules[f"lora_{factor}{slot.suffix}"]
    if not state.adapters:
        del layer.__dict__[STATE]


def activate(
    layer: nn.Module,
    adapters: tuple[str, ...],
    rows: tuple[str | None, ...] | None,
    weights: Mapping[str, float],
) -> None:
    """Activates, in this order, those of `adapters` that a layer has; `rows` and `weights` are as in `LayerState`."""
    state = layer_state(layer)
    state.active = tuple(name for name in adapters if name in state.adapters)
    state.rows, state.weights = rows, {name: weights[name] for name in state.active if name in weights}
    state.index = _index(layer, state.active, rows) if rows is not None and state.active else None
    refresh_class(layer)


def _index(layer: nn.Module, active: tuple[str, ...], rows: tuple[str | None, ...]) -> Tensor:
    """Returns for each row the index of its adapter among the active ones, or their number for a row without one."""
    places: dict[str | None, int] = {name: at for at, name in enumerate(active)}
    device = next(adapter_parameters(layer, active[0])).device
    with torch.inference_mode(False):
        return torch.tensor([places.get(row, len(active)) for row in rows], device=device)


def adapter_parameters(layer: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yields the tensors of each slot of an adapter on a layer; nothing if the layer does not have it."""
    return (parameter for _, parameter in named_adapter_parameters(layer, adapter))


def named_adapter_parameters(layer: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields what `adapter_parameters` yields, each with its name in the layer, such as `lora_A_q.default`."""
    state = state_of(layer)
    if state is not None and adapter in state.adapters:
        for slot in state.adapters[adapter].slots:
            for name, parameter in slot_tensors(layer, adapter, slot).items():
                yield f"lora_{name}{slot.suffix}.{adapter}", parameter


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A and B of all adapters by full name, shared ones under each of their names."""
    return {
        plain_name(f"{name}.{adapter}"): parameter
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdapterTensors)
        for adapter, parameter in module._parameters.items()
        if parameter is not None
    }


def _add(module: nn.Module, layer: PlannedLayer, adapter: str) -> None:
    state = state_of(module) or LayerState(name=layer.name)
    module.__dict__[STATE] = state
    state.adapters[adapter] = layer


def _container(module: nn.Module, factor: str, slot: Slot) -> AdapterTensors:
    name = f"lora_{factor}{slot.suffix}"
    if name not in module._modules:
        module._modules[name] = AdapterTensors()
    container = module._modules[name]
    assert isinstance(container, AdapterTensors)
    return container
