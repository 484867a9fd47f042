"""Puts adapters on layers, takes them off again, and decides what is trained."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora_plugins.inplace.layer import (
    STATE,
    AdapterTensors,
    LayerAdapter,
    LayerState,
    base_class_of,
    factors,
    layer_state,
    own_tensors_of,
    peek_weight,
    refresh_class,
    state_of,
)
from lora_plugins.inplace.modules import full_name, holder_of
from lora_plugins.plan.plan import Plan, PlannedLayer
from lora_plugins.plugins.init import InitContext, Observed
from lora_plugins.plugins.layer import Slot


@dataclass(frozen=True)
class SlotTensors:
    """The tensors of one slot of one layer.

    Args:
        A: `(r, in)`.
        B: `(out, r)`.
        recipe: What the init needs to compute the changed base again; empty for most inits.
        own: The tensors that are the variant's own, by name; empty for plain LoRA.
    """

    A: Tensor
    B: Tensor
    recipe: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)


AdapterContent = Mapping[tuple[str, str], SlotTensors]
"""The tensors of an adapter by layer name and slot suffix."""


def slots(plan: Plan) -> Iterator[tuple[PlannedLayer, Slot, tuple[int, int]]]:
    """Yields layer, slot and `(out, in)` of everything that gets an A and a B."""
    for layer in plan.layers:
        for slot, shape in zip(layer.slots, layer.shapes, strict=True):
            yield layer, slot, shape


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Returns the type of A and B: that of the weight, or float32 where the weight has half precision."""
    return torch.promote_types(weight.dtype, torch.float32)


def initialize(
    model: nn.Module, plan: Plan, observed: Mapping[tuple[str, str], Observed] | None = None
) -> dict[tuple[str, str], SlotTensors]:
    """Lets the plan's init make A and B of every slot; touches nothing of the model.

    Each slot draws from a generator of its own, seeded by the run's seed and the layer's name, so that every process
    of a run and every rerun agree, whatever was drawn before.

    Args:
        model: The model.
        plan: What is adapted.
        observed: What data showed of each slot, for an init that needs it.
    """
    content: dict[tuple[str, str], SlotTensors] = {}
    for layer, slot, (rows, columns) in slots(plan):
        weight = peek_weight(model.get_submodule(layer.name), slot.tensor)
        dtype = factor_dtype(weight)
        context = InitContext(
            layer=layer.name,
            weight=slot_matrix(layer, slot, weight).to("cpu", dtype)
            if plan.init.changes_base
            else slot_matrix(layer, slot, weight).to(dtype),
            A=torch.empty(layer.r, columns, dtype=dtype),
            B=torch.empty(rows, layer.r, dtype=dtype),
            scaling=layer.scaling,
            lookup=layer.plugin.lookup,
            generator=torch.Generator().manual_seed(run_seed(layer.name + slot.suffix)),
            options=plan.init_options,
            observed=(observed or {}).get((layer.name, slot.suffix), Observed()),
        )
        with torch.no_grad():
            recipe = plan.init.fill(context)
        content[layer.name, slot.suffix] = SlotTensors(context.A, context.B, recipe)
    return content


def changed_bases(model: nn.Module, plan: Plan, content: AdapterContent) -> dict[str, Tensor]:
    """Computes the base weights that the plan's init replaces, by full name; empty for most inits."""
    if not plan.init.changes_base:
        return {}
    changed: dict[str, Tensor] = {}
    for layer, slot, _ in slots(plan):
        name = full_name(layer.name, slot.tensor)
        original = peek_weight(model.get_submodule(layer.name), slot.tensor)
        weight = changed.get(name, original)
        matrix = layer.plugin.to_matrix(weight).clone()
        recipe = {key: value.cpu() for key, value in content[layer.name, slot.suffix].recipe.items()}
        with torch.no_grad():
            new = plan.init.changed_base(
                slot_matrix(layer, slot, original).to("cpu", factor_dtype(original)),
                recipe,
                layer.scaling,
                plan.init_options,
            )
        slot.cut(matrix).copy_(new)
        laid_out = torch.empty_like(original)  # keeps the memory format
        changed[name] = laid_out.copy_(layer.plugin.from_matrix(matrix, original.shape))
    return changed


def with_own_tensors(
    model: nn.Module, plan: Plan, content: AdapterContent, changed: Mapping[str, Tensor]
) -> AdapterContent:
    """Returns the content of a new adapter with the first values of its variant's own tensors.

    Args:
        model: The model.
        plan: What is adapted.
        content: Its factors.
        changed: The base weights that the init replaces, by full name.
    """
    completed = dict(content)
    for layer, slot, _ in slots(plan):
        if layer.variant is not None:
            tensors = content[layer.name, slot.suffix]
            name = full_name(layer.name, slot.tensor)
            weight = changed.get(name, peek_weight(model.get_submodule(layer.name), slot.tensor))
            A, B = tensors.A.to(weight.device), tensors.B.to(weight.device)
            own = layer.variant.first_values(slot_matrix(layer, slot, weight).to(A.dtype), A, B, layer.scaling)
            completed[layer.name, slot.suffix] = replace(tensors, own=own)
    return completed


def slot_matrix(layer: PlannedLayer, slot: Slot, weight: Tensor) -> Tensor:
    """Returns the matrix view `(out, in)` of the part of a weight that a slot covers."""
    return slot.cut(layer.plugin.to_matrix(weight))


def attach(model: nn.Module, plan: Plan, adapter: str, content: AdapterContent) -> None:
    """Puts an adapter on its layers, not yet active."""
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        _add(module, layer, adapter, layer.slots, tie=False)
        for slot in layer.slots:
            tensors = content[layer.name, slot.suffix]
            weight = peek_weight(module, slot.tensor)
            for factor, value in {"A": tensors.A, "B": tensors.B, **tensors.own}.items():
                _container(module, factor, slot)[adapter] = nn.Parameter(
                    value.to(weight.device, factor_dtype(weight)), requires_grad=False
                )
        for tie in layer.ties:
            other = model.get_submodule(tie.layer)
            shared = tuple(replace(slot, tensor=tie.tensor) for slot in layer.slots if slot.tensor == tie.source)
            _add(other, replace(layer, name=tie.layer), adapter, shared, tie=True)
            for slot in shared:
                for factor, parameter in _tensors(module, adapter, slot).items():
                    _container(other, factor, slot)[adapter] = parameter


def detach(layer: nn.Module, adapter: str) -> None:
    """Takes an adapter off a layer; without any other the layer is what it was."""
    state = layer_state(layer)
    tensors = {slot: _tensors(layer, adapter, slot) for slot in state.adapters[adapter].slots}
    del state.adapters[adapter]
    for slot, names in tensors.items():
        for factor in names:
            container = _container(layer, factor, slot)
            del container[adapter]
            if not len(container):
                del layer._modules[f"lora_{factor}{slot.suffix}"]
    state.active = tuple(name for name in state.active if name != adapter)
    refresh_class(layer)
    if not state.adapters:
        del layer.__dict__[STATE]


def activate(layer: nn.Module, adapters: tuple[str, ...]) -> None:
    """Makes those of `adapters` that a layer has its active ones, in this order."""
    state = layer_state(layer)
    state.active = tuple(name for name in adapters if name in state.adapters)
    refresh_class(layer)


def adapter_parameters(layer: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yields the tensors of each slot of an adapter on a layer; nothing if the layer does not have it."""
    state = state_of(layer)
    if state is not None and adapter in state.adapters:
        for slot in state.adapters[adapter].slots:
            yield from _tensors(layer, adapter, slot).values()


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A and B of all adapters by their names in the state dict, shared ones under each of their names."""
    return {
        f"{name}.{adapter}": parameter
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdapterTensors)
        for adapter, parameter in module._parameters.items()
        if parameter is not None
    }


def trained_values(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Copies what the adapter will train or move in place: its first values.

    Parameters are float32, as everything trained is, unless the whole model is bfloat16.
    """
    values: dict[str, Tensor] = {}
    all_bfloat16 = _all_bfloat16(model)
    for name in plan.trained:
        module, key = holder_of(model, name)
        parameter = module._parameters[key]
        assert parameter is not None
        dtype = parameter.dtype if all_bfloat16 else factor_dtype(parameter)
        values[name] = parameter.detach().to(dtype, copy=True)
    for name in plan.saved_buffers:
        module, key = holder_of(model, name)
        buffer = module._buffers[key]
        assert buffer is not None
        values[name] = buffer.detach().clone()
    return values


def _add(module: nn.Module, layer: PlannedLayer, adapter: str, slots: tuple[Slot, ...], *, tie: bool) -> None:
    state = state_of(module) or LayerState(name=layer.name, base_class=base_class_of(module))
    module.__dict__[STATE] = state
    state.adapters[adapter] = LayerAdapter(
        plugin=layer.plugin,
        branch_use="never" if tie else layer.branch_use,  # a branch knows its own layer's use of the weight only
        slots=slots,
        r=layer.r,
        alpha=layer.alpha,
        scaling=layer.scaling,
        dropout=layer.dropout,
        low_memory=layer.low_memory,
        variant=layer.variant,
    )


def _tensors(layer: nn.Module, adapter: str, slot: Slot) -> dict[str, nn.Parameter]:
    A, B = factors(layer, adapter, slot)
    return {"A": A, "B": B, **own_tensors_of(layer, adapter, slot)}


def _container(module: nn.Module, factor: str, slot: Slot) -> AdapterTensors:
    container = module._modules.setdefault(f"lora_{factor}{slot.suffix}", AdapterTensors())
    assert isinstance(container, AdapterTensors)
    return container


def run_seed(name: str) -> int:
    """Returns the seed that a name has in this run, whatever was drawn before."""
    digest = hashlib.sha256(f"{torch.initial_seed()}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _all_bfloat16(model: nn.Module) -> bool:
    return all(p.dtype == torch.bfloat16 for p in model.parameters() if p.dtype.is_floating_point)
