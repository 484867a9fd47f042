"""Hot swap: an adapter takes over the tensors of another one, in its present shapes.

A rank that is smaller is filled up with zeros, and another scaling goes into B, so that nothing of the model changes
but values: compiled graphs and optimizers stay valid. The new values have memory of their own, since a rollback needs
the former ones, so a CUDA graph that was recorded by hand has to be recorded again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_plugins.adapter.content import NewAdapter, SlotTensors
from lora_plugins.adapter.integrity import check_in_place
from lora_plugins.adapter.state import ModelState
from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.inplace import own_tensor, slot_tensors, submodule
from lora_plugins.plan import Plan
from lora_plugins.plugins import PLAIN, PlannedLayer
from lora_plugins.utils import in_float64, put_value


def swap(model: nn.Module, state: ModelState, adapter: str, other: NewAdapter) -> None:
    """Gives an adapter, which keeps its name, its configuration and its ranks, the tensors of another one.

    Raises:
        AdapterFileError: If the other one does not fit into the shapes that are there. Nothing has changed then.
        StateError: If a layer of the adapter was replaced or has another name.
    """
    own = state.adapters[adapter].plan
    check_in_place(model, state, adapter)
    if other.stored:
        raise _unfit(f"it was trained on {listing(other.stored)} stored in fewer bytes")
    _check(own, other.plan, other.values)
    given = {layer.name: layer for layer in other.plan.layers}
    new: list[tuple[Tensor, Tensor]] = []
    for layer, slot, _ in own.slots():
        tensors = slot_tensors(submodule(model, layer.name), adapter, slot)
        fitted = _fitted(tensors, layer, given.get(layer.name), other.content.get((layer.name, slot.suffix)))
        new += [(tensor, fitted[name]) for name, tensor in tensors.items()]
    waiting: dict[str, Tensor] = {}
    for name, value in other.values.items():
        present = state.values.value(model, adapter, name)
        taken = value.to(present.device, present.dtype, copy=True)
        if state.values.owner.get(name) == adapter:
            new.append((own_tensor(model, name), taken))
        else:
            waiting[name] = taken
    for tensor, value in new:
        put_value(tensor, value)
    state.values.values[adapter].update(waiting)


def _check(own: Plan, other: Plan, values: Mapping[str, Tensor]) -> None:
    """Refuses what does not fit into the present shapes."""
    for plan in (own, other):
        if plan.init.changes_base:
            raise _unfit(f"the init {plan.init.name!r} has changed the base")
    if own.config.variant != other.config.variant:
        raise _unfit(f"it is of the variant {other.config.variant!r}, and the one that is there {own.config.variant!r}")
    there = {layer.name: layer for layer in own.layers}
    missing = [layer.name for layer in other.layers if layer.name not in there]
    if missing:
        raise _unfit(f"it adapts {listing(missing)}, which the one that is there does not")
    if own.config.variant != PLAIN and len(there) > len(other.layers):
        raise _unfit(
            f"a variant has to be on all layers, and {listing(there.keys() - {x.name for x in other.layers})} lack it"
        )
    for layer in other.layers:
        _check_layer(there[layer.name], layer)
    if differing := values.keys() ^ own.saved_in_place:
        raise _unfit(f"only one of the two has values of {listing(differing)}")


def _check_layer(own: PlannedLayer, other: PlannedLayer) -> None:
    if other.slots != own.slots:
        raise _unfit(f"it adapts other parts of {other.name!r}")
    if other.ties != own.ties:
        shared = sorted({tie.layer for tie in (*other.ties, *own.ties)})
        raise _unfit(f"only one of the two adapts {listing(shared)} with {other.name!r}, whose weight they share")
    if other.r > own.r:
        raise _unfit(f"its rank on {other.name!r} is {other.r}, and that of the one that is there {own.r}")
    resized = (other.r, other.scaling) != (own.r, own.scaling)
    if resized and own.variant is not None and not own.variant.rescales_rows:
        raise _unfit(
            f"its rank or scaling on {other.name!r} differs, on which the variant {own.variant.name!r} may depend in "
            "other ways than by scaling · B·A"
        )


def _unfit(reason: str) -> AdapterFileError:
    return AdapterFileError(
        f"The adapter cannot take the place of the one that is there: {reason}. Add it beside: load_adapter(model, "
        "path, adapter_name)."
    )


def _fitted(
    tensors: Mapping[str, Tensor], layer: PlannedLayer, other: PlannedLayer | None, content: SlotTensors | None
) -> dict[str, Tensor]:
    """Returns the new tensors in the shapes and types of the present ones, filled up with zeros."""
    fitted = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in tensors.items()}
    if other is not None and content is not None:
        fitted["A"][: other.r].copy_(content.A)
        fitted["B"][:, : other.r].copy_(in_float64(content.B) * (other.scaling / layer.scaling))
        for name, value in content.own.items():
            if value.shape != fitted[name].shape:
                raise _unfit(
                    f"{name!r} of {layer.name!r} is {list(value.shape)}, in place of {list(fitted[name].shape)}"
                )
            fitted[name].copy_(value)
    return fitted
