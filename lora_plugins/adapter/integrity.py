"""Whether an adapter is still intact on its model: other code may have replaced parts of it."""

from torch import nn

from lora_plugins.adapter.acting import norms_to_freeze
from lora_plugins.adapter.state import ModelState, adapted_layers
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import (
    has_statistics,
    is_frozen,
    layer_state,
    model_modules,
)


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
    """Checks that the frozen norms are still those of the base.

    Raises:
        StateError: If others have taken their places.
    """
    modules, frozen = model_modules(model), norms_to_freeze(state)
    moving = [e.name for e in modules if e.name in frozen and has_statistics(e.module) and not is_frozen(e.module)]
    if moving:
        raise StateError(
            f"{listing(moving)} took the place of norms that stand still for the adapter {adapter!r}, and their "
            "statistics, which it does not hold, may have moved. Replace norms before adapters are added, as by "
            "convert_sync_batchnorm, or let them move: norm='track'."
        )
