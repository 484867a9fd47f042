"""Different adapters for different rows of one batch."""

from collections.abc import Mapping
from functools import partial

from torch import nn

from lora_plugins.adapter.acting import values_by_tensor
from lora_plugins.adapter.blocks import Within
from lora_plugins.adapter.state import Block, ModelState, adapted_layers
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import base_class_of, holders, layer_state, model_modules, own_mode, state_of
from lora_plugins.plugins import LayerPlugin, PlannedLayer


def mixed_batch(model: nn.Module, rows: tuple[str | None, ...]) -> Within:
    """Gives each row of a batch its adapter, or None for the base, for the duration of the block.

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
    state.values.check_there(model, names)
    _check_values(model, names, state)
    _check_layers(model, names)


def _check_values(model: nn.Module, names: tuple[str, ...], state: ModelState) -> None:
    """Refuses values that adapters have of their own in modules around adapted layers."""
    modules = model_modules(model)
    shared = [
        name
        for name, module in holders(modules, values_by_tensor(modules, state, names)).items()
        if any(state_of(child) is not None for child in module.modules())
    ]
    if shared:
        raise StateError(
            f"Adapters have their own values of what {listing(shared)} holds, beside updates that go in by rows. Run "
            "one batch for each adapter, with set_adapter."
        )


def _check_layers(model: nn.Module, names: tuple[str, ...]) -> None:
    """Refuses layers whose rows cannot have adapters of their own."""
    layers = adapted_layers(model)
    problems = [
        (name, problem)
        for name, layer in layers.items()
        for adapter in names
        if (planned := layer_state(layer).adapters.get(adapter)) and (problem := _problem(planned, layer))
    ]
    if problems:
        owners, unable = _owners(layers, names), dict[str, dict[str, None]]()
        for name, problem in problems:
            reason = f"it shares the weight of {owners[name]!r}" if name in owners else problem
            unable.setdefault(reason, {})[name] = None
        told = "; ".join(f"{listing(those)}: {reason}" for reason, those in unable.items())
        raise StateError(
            f"These layers cannot mix adapters in one batch: {told}. Run one batch for each adapter, with set_adapter."
        )


def _owners(layers: Mapping[str, nn.Module], names: tuple[str, ...]) -> dict[str, str]:
    """Returns the layers that share the weight of another one, whose adapter is theirs too, each with that."""
    every = [layer_state(layer).adapters.get(name) for layer in layers.values() for name in names]
    return {tie.layer: planned.name for planned in every if planned for tie in planned.ties}


def _problem(planned: PlannedLayer, layer: nn.Module) -> str:
    """Returns why the rows of a batch cannot have adapters of their own on a layer; empty if they can."""
    plugin, variant = planned.plugin, planned.variant
    if type(plugin).mixed is LayerPlugin.mixed:
        return f"the plugin {plugin.name!r} has no branch for that"
    if variant is not None and variant.rescales_rows and plugin.branch_takes_rescaling and not planned.rescales:
        return f"the variant {variant.name!r} covers a part of its weight alone"
    if variant is not None and not planned.rescales:
        return f"the plugin {plugin.name!r} has no branch for the variant {variant.name!r}"
    if planned.branch_use == "never":
        return f"the plugin {plugin.name!r} has no branch for the class {base_class_of(layer).__name__}"
    if len({slot.tensor for slot in planned.slots}) > 1:
        return f"{plugin.name!r} layers have updates of several weights"
    return plugin.mixing_problem(layer)
