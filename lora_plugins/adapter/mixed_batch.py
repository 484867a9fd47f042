"""Different adapters for different rows of one batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_plugins.adapter.attach import activate
from lora_plugins.adapter.state import ModelState, adapted_layers, apply_state
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace.layer import layer_state
from lora_plugins.plugins.layer import LayerPlugin


@contextmanager
def mixed(model: nn.Module, state: ModelState, rows: tuple[str | None, ...]) -> Iterator[None]:
    """Gives each row of a batch its adapter for the time of the block.

    Args:
        model: An adapted model.
        state: Its adapters.
        rows: The adapter of each row; None for the base.

    Raises:
        StateError: If that is not possible; the model is untouched.
    """
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    _check(model, state, names)
    try:
        state.values.activate(model, ())
        for layer in adapted_layers(model).values():
            activate(layer, names)
            layer_state(layer).rows = rows
        yield
    finally:
        for layer in adapted_layers(model).values():
            layer_state(layer).rows = None
        apply_state(model, state)


def _check(model: nn.Module, state: ModelState, names: tuple[str, ...]) -> None:
    state.refuse_merged("Mixing adapters in one batch")
    if model.training:
        raise StateError("Mixing adapters in one batch is for inference. Call model.eval() first.")
    for name in names:
        state.adapter(name)
        if own := state.values.values.get(name):
            raise StateError(
                f"The adapter {name!r} has its own values of {listing(own)}, which all rows of a batch share. "
                "Run one batch for each adapter, with set_adapter."
            )
    unable = [
        name
        for name, layer in adapted_layers(model).items()
        for adapter in names
        if (spec := layer_state(layer).adapters.get(adapter)) is not None
        and (spec.variant or spec.branch_use != "always" or type(spec.plugin).mixed is LayerPlugin.mixed)
    ]
    if unable:
        raise StateError(
            f"The layers {listing(dict.fromkeys(unable))} are of a type or variant that cannot mix adapters in one "
            "batch. Run one batch for each adapter, with set_adapter."
        )
