"""Whether an adapter is still on the model that it was added to: others may have replaced or thawed parts of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_plugins.adapter.acting import still_norms
from lora_plugins.adapter.state import ModelState, adapted_layers, model_state
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import (
    has_statistics,
    is_frozen,
    layer_state,
    model_modules,
    own_tensor,
    own_tensors,
    persistent_buffers,
)
from lora_plugins.plan import Plan
from lora_plugins.utils import FINGERPRINT, fingerprint

_ROUNDING = 16
"""Units in the last place by which an average of equal values may differ from them."""


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
    modules, still = model_modules(model), still_norms(state)
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


def buffer_fingerprints(model: nn.Module, plan: Plan) -> dict[str, dict[str, float]]:
    """Returns fingerprints of the base's buffers that a state dict has and the adapter is saved without, by name.

    Those of norms that stand still are not among them.
    """
    state = model_state(model)
    found = {}
    for name, buffer in persistent_buffers(model_modules(model)).items():
        held = name in plan.saved_buffers or name.rpartition(".")[0] in plan.frozen_norms
        if not held and type(buffer) is Tensor and buffer.layout is torch.strided and not buffer.is_meta:
            value = buffer if state is None else state.values.base_value(model, name)
            found[name] = fingerprint((torch.view_as_real(value) if value.is_complex() else value).nan_to_num())
    return found


def moved_buffers(model: nn.Module, state: ModelState, adapter: str) -> list[str]:
    """Returns the names of buffers that have changed since an adapter was added, and that it does not hold.

    What an average or a cast has rounded is none.
    """
    before, now = state.adapters[adapter].buffers, buffer_fingerprints(model, state.adapters[adapter].plan)
    units = {name: _unit(own_tensor(model, name)) for name in before.keys() & now.keys()}
    return [name for name in now if name in units and _differ(before[name], now[name], _ROUNDING * units[name])]


def _unit(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() or tensor.is_complex() else 0.0


def _differ(before: Mapping[str, float], now: Mapping[str, float], share: float) -> bool:
    scale = share * max(before["norm"], now["norm"])
    return any(abs(before[key] - now[key]) > scale for key in FINGERPRINT)
