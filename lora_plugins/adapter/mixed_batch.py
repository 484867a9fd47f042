"""Different adapters for different rows of one batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_plugins.adapter.state import Block, ModelState, adapted_layers, block
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import layer_state
from lora_plugins.plugins import LayerPlugin


@contextmanager
def mixed_batch(model: nn.Module, state: ModelState, rows: tuple[str | None, ...]) -> Iterator[None]:
    """Gives each row of a batch its adapter for the time of the block.

    Args:
        model: An adapted model.
        state: Its adapters.
        rows: The adapter of each row; None for the base.

    Raises:
        StateError: If that is not possible; the model is untouched.
    """
    state.check("mixed_batch")
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    _check(model, state, names)
    with block(model, state, Block("mixed_batch", names, rows)):
        yield


def _check(model: nn.Module, state: ModelState, names: tuple[str, ...]) -> None:
    if model.training:
        raise StateError("Mixing adapters in one batch is for inference. Call model.eval() first.")
    for name in names:
        state.adapter(name)
        if own := state.values.of(name):
            raise StateError(
                f"The adapter {name!r} has its own values of {listing(own)}, which all rows of a batch share. "
                "Run one batch for each adapter, with set_adapter."
            )
    unable = [
        name
        for name, layer in adapted_layers(model).items()
        for adapter in names
        if (planned := layer_state(layer).adapters.get(adapter)) is not None
        and (planned.variant or planned.branch_use != "always" or type(planned.plugin).mixed is LayerPlugin.mixed)
    ]
    if unable:
        raise StateError(
            f"The layers {listing(dict.fromkeys(unable))} are of a type or variant that cannot mix adapters in one "
            "batch. Run one batch for each adapter, with set_adapter."
        )
