"""Whether an adapter is still intact on its model: other code may have replaced parts of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_plugins.adapter.acting import norms_to_freeze
from lora_plugins.adapter.attach import adapter_parameters
from lora_plugins.adapter.state import ModelState, adapted_layers
from lora_plugins.errors import StateError, counted, listing
from lora_plugins.inplace import has_statistics, is_frozen, layer_state, model_modules


def check_complete(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Checks that an adapter is on all of its layers.

    Raises:
        StateError: If one of them is not there any more, and with it its update.
    """
    _check_complete(_places(_names(model, adapter)), state, adapter)


def check_in_place(model: nn.Module, state: ModelState, adapter: str, *, read_only: bool = False) -> None:
    """Checks that an adapter is on all of its layers, where they were when it was added, and on no copy of one.

    With `read_only`, layers that share a weight may have equal tensors each, as nothing is written into them.

    Raises:
        StateError: If one of them is not there any more, or has another name, or was copied within the model; or if one
            that shares its weight with another one has tensors of its own.
    """
    names = _names(model, adapter)
    places = _places(names)
    copied = {copy: origin for copy, origin in names.items() if places[origin] != copy}
    if copied:
        first, origin = next(iter(copied.items()))
        raise StateError(
            f"{listing(copied)} were copied after the adapter {adapter!r} was added, as {first!r} from {origin!r}, "
            "so it has no place for what they learn. Make the copy before that (in a LightningModule, in __init__ or "
            "setup), so that both are adapted; or keep it out of the model's modules, as in a list."
        )
    _check_complete(places, state, adapter)
    moved = {name: place for name, place in places.items() if name != place}
    if moved:
        name, place = next(iter(moved.items()))
        raise StateError(
            f"{counted(len(moved), 'layer has', 'layers have')} another name than when the adapter {adapter!r} was "
            f"added, such as {name!r}, which is {place!r} now. Put them back, or add an adapter when they are in place."
        )
    if parted := _parted(model, state, adapter, read_only):
        name, source = next(iter(parted.items()))
        raise StateError(
            f"{listing(parted)} had the tensors of {source!r} when the adapter {adapter!r} was added, since they share "
            "a weight, and others since, as load_state_dict(assign=True), to_empty() and offloading by accelerate give "
            "them; the adapter has no place for these. Load without assign=True, into a new model, or keep what both "
            "have learned: merge_and_unload()."
        )


def _parted(model: nn.Module, state: ModelState, adapter: str, read_only: bool) -> dict[str, str]:
    """Returns the layers that should have the tensors of another one and have not, each with the other one."""
    ties = {tie.layer: layer.name for layer in state.adapters[adapter].plan.layers for tie in layer.ties}
    if not ties:
        return {}
    own = {name: [*adapter_parameters(layer, adapter)] for name, layer in adapted_layers(model).items()}
    shared = {name: [_is_among(tensor, own[ties[name]], read_only) for tensor in own.get(name, ())] for name in ties}
    return {name: ties[name] for name, found in shared.items() if not all(found)}


def _is_among(tensor: Tensor, others: list[nn.Parameter], equal: bool) -> bool:
    """Whether a tensor is one of others, or has its values, where an `equal` one will do."""
    if any(tensor is other for other in others):
        return True
    return equal and any(torch.equal(tensor, other.to(tensor)) for other in others)


def _places(names: Mapping[str, str]) -> dict[str, str]:
    """Returns the names that the layers of an adapter have now, by those that they had when it was added."""
    places = {origin: name for name, origin in names.items()}
    return places | {origin: name for name, origin in names.items() if name == origin}  # not those of a copy


def _check_complete(places: Mapping[str, str], state: ModelState, adapter: str) -> None:
    lost = [layer.name for layer in state.adapters[adapter].plan.layers if layer.name not in places]
    if lost:
        raise StateError(
            f"The update of {listing(lost)} by the adapter {adapter!r} is gone: the layer was replaced. Put it back, "
            "or take the adapter off: unload()."
        )


def _names(model: nn.Module, adapter: str) -> dict[str, str]:
    """Returns the names of layers that have an adapter, each with the one that it had when it was added."""
    layers = {name: layer_state(layer) for name, layer in adapted_layers(model).items()}
    return {name: layer.name for name, layer in layers.items() if adapter in layer.adapters}


def check_norms(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Checks that the frozen norms are still those of the base.

    Raises:
        StateError: If others have taken their places.
    """
    modules, frozen = model_modules(model), norms_to_freeze(state)
    moving = [e.name for e in modules if e.name in frozen and has_statistics(e.module) and not is_frozen(e.module)]
    if moving:
        raise StateError(
            f"{listing(moving)} replaced norms that are frozen for the adapter {adapter!r}, and their statistics, "
            "which it does not hold, may have moved. Replace norms (convert_sync_batchnorm does that) before adapters "
            "are added, or let them move: norm='track'."
        )
