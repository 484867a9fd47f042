"""Different adapters for different rows of one batch."""

from functools import partial

from torch import nn

from lora_plugins.adapter.acting import own_holders
from lora_plugins.adapter.blocks import Within
from lora_plugins.adapter.state import Block, ModelState, adapted_layers
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import layer_state, model_modules, own_mode, state_of
from lora_plugins.plugins import LayerPlugin, PlannedLayer


def mixed_batch(model: nn.Module, rows: tuple[str | None, ...]) -> Within:
    """Gives each row of a batch its adapter for the duration of the block.

    Args:
        model: An adapted model.
        rows: The adapter of each row; None for the base.

    Raises:
        StateError: When the block is entered, if that is not possible; the model is untouched.
    """
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    return Within(model, Block("mixed_batch", names, rows), partial(_check, model, names))


def _check(model: nn.Module, names: tuple[str, ...], state: ModelState) -> None:
    if own_mode(model):
        raise StateError("Mixing adapters in one batch is for inference. Call model.eval() first.")
    for name in names:
        state.adapter(name)
    modules = model_modules(model)
    shared = [
        name
        for name, module in own_holders(modules, state, names).items()
        if any(state_of(child) is not None for child in module.modules())
    ]
    if shared:
        raise StateError(
            f"Adapters have their own values of what {listing(shared)} holds, beside updates that go in by rows. Run "
            "one batch for each adapter, with set_adapter."
        )
    unable = [
        name
        for name, layer in adapted_layers(model).items()
        for adapter in names
        if (planned := layer_state(layer).adapters.get(adapter)) is not None and not _mixes(planned)
    ]
    if unable:
        raise StateError(
            f"The layers {listing(dict.fromkeys(unable))} are of a type or variant that cannot mix adapters in one "
            "batch. Run one batch for each adapter, with set_adapter."
        )


def _mixes(planned: PlannedLayer) -> bool:
    """Whether the rows of a batch may have adapters of their own on a layer."""
    branches = planned.branch_use == "always" if planned.variant is None else planned.rescales
    return branches and type(planned.plugin).mixed is not LayerPlugin.mixed and planned.branch_use != "never"
