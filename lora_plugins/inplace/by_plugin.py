"""Computes an adapted layer by the branch of its plugin, for all rows alike or for each row with its own adapter."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_plugins.errors import add_place
from lora_plugins.inplace.deltas import rescaled_term, stacked_adapters, term_of
from lora_plugins.inplace.frozen_norm import own_mode
from lora_plugins.inplace.layer_state import Branch, layer_state
from lora_plugins.inplace.tensor_subclasses import as_one_operation


def by_plugin(
    layer: nn.Module,
    branch: Branch,
    weights: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    order: Sequence[str] = (),
    shown: Any = None,
) -> Any:
    """Computes the output of a layer, as the branch of its active updates says.

    `order` has the names of the parameters of its forward, and `shown` is what the plugin sees in place of the layer.
    """
    state, training = layer_state(layer), own_mode(layer)
    what: Any
    if state.rows is None:
        term = rescaled_term if branch.rescales else term_of
        what = [term(layer, name, planned, slot, training=training) for name, planned, slot in branch.updates]
        method = "branch"
    else:
        first = args[0] if args else next(kwargs[name] for name in order if name in kwargs)
        what = stacked_adapters(layer, state, state.rows, first, training=training)
        method = "mixed"
    compute = functools.partial(getattr(branch.plugin, method), layer if shown is None else shown, weights, what)
    try:
        return as_one_operation(compute, *args, **kwargs)
    except Exception as error:
        add_place(error, f"{method}() of the layer type {branch.plugin.name!r}, for {state.name!r}")
        raise
