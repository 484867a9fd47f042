"""Checks ahead of a training that ends with a merge, so that the merge is not refused after it."""

from torch import nn

from lora_plugins.adapter import adapted_layers, check_shared, model_state
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import foreign_weights, model_modules, stored_weights, submodule
from lora_plugins.plan import Plan


def check_merge_later(model: nn.Module, *, dequantize: bool, otherwise: str, plan: Plan | None = None) -> list[str]:
    """Checks that layers which are not adapted share no adapted weight, and that merged ones are not stored again.

    `otherwise` names the arguments without which nothing is merged, and `plan` is of what is about to be adapted.

    Returns:
        The names of the layers whose weights are stored in fewer bytes, by us or by another library.

    Raises:
        MergeError: If a layer that is not adapted has one of the weights too.
        StateError: If some are stored in fewer bytes and stay so.
    """
    planned = {} if plan is None else {layer.name: submodule(model, layer.name) for layer in plan.layers}
    for each in _plans(model) if plan is None else [plan]:
        check_shared(model, each.weights())
    stored = [entry.name for entry in model_modules(model) if stored_weights(entry.module)]
    foreign = [name for name, layer in {**adapted_layers(model), **planned}.items() if foreign_weights(layer)]
    to_store = [] if plan is None else [name.rpartition(".")[0] for name in plan.stored]
    names = [*dict.fromkeys([*stored, *foreign, *to_store])]
    if names and not dequantize:
        raise StateError(
            f"The weights of {listing(names)} are stored in fewer bytes, which cannot hold a merged update. Set "
            f"dequantize=True, so that the merged model has dense weights; or {otherwise}."
        )
    return names


def _plans(model: nn.Module) -> list[Plan]:
    """Returns those of the adapters that act."""
    state = model_state(model)
    return [] if state is None else [state.adapters[name].plan for name in state.active]
