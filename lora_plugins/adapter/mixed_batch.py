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
    layers = adapted_layers(model)
    every = [planned for layer in layers.values() for planned in layer_state(layer).adapters.values()]
    tied = {tie.layer: planned.name for planned in every for tie in planned.ties}
    unable: dict[str, dict[str, None]] = {}
    for name, layer in layers.items():
        planned = layer_state(layer).adapters
        for adapter in (each for each in names if each in planned):
            if problem := _problem(planned[adapter], layer, tied.get(name)):
                unable.setdefault(problem, {})[name] = None
    if unable:
        problems = "; ".join(f"{listing(those)}: {problem}" for problem, those in unable.items())
        raise StateError(
            f"These layers cannot mix adapters in one batch: {problems}. Run one batch for each adapter, with "
            "set_adapter."
        )


def _problem(planned: PlannedLayer, layer: nn.Module, owner: str | None) -> str:
    """Returns why the rows of a batch cannot have adapters of their own on a layer; empty if they can.

    Args:
        planned: What one of the adapters does there.
        layer: The layer.
        owner: The layer whose adapter it shares, as it shares its weight; None if it has its own.
    """
    plugin, variant = planned.plugin, planned.variant
    if owner is not None:
        return f"it shares the weight of {owner!r}"
    if type(plugin).mixed is LayerPlugin.mixed:
        return f"the plugin {plugin.name!r} has no branch for that"
    if variant is not None and variant.rescales_rows and plugin.branch_takes_rescaling and not planned.rescales:
        return f"the variant {variant.name!r} covers a part of its weight alone"
    if variant is not None and not planned.rescales:
        return f"the plugin {plugin.name!r} has no branch for the variant {variant.name!r}"
    if planned.branch_use == "never":
        return f"the plugin {plugin.name!r} has no branch for the class {layer_state(layer).base_class.__name__}"
    if len({slot.tensor for slot in planned.slots}) > 1:
        return f"{plugin.name!r} layers have updates of several weights"
    return plugin.mixing_problem(layer)
