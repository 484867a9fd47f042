"""Puts stored weights in the place of parameters, and parameters in the place of stored weights."""

import torch
from torch import Tensor, nn

from lora_plugins.inplace.adapted_class import refresh_class
from lora_plugins.inplace.layer_state import state_of
from lora_plugins.inplace.stored_class import resting_class
from lora_plugins.inplace.stored_weight import SUFFIX, StoredWeight, stored_weight


def put_stored(layer: nn.Module, name: str, stored: StoredWeight) -> None:
    """Puts a stored weight in the place of a parameter, or of another stored weight."""
    layer._parameters.pop(name, None)
    layer._modules[name + SUFFIX] = stored
    _refresh(layer)


def put_dense(layer: nn.Module, name: str, value: Tensor | None = None) -> None:
    """Makes a parameter of a stored weight.

    Args:
        layer: The layer.
        name: Attribute name of the weight.
        value: Its value from now on; by default the dense one that it has.
    """
    stored = stored_weight(layer, name)
    assert stored is not None
    with torch.no_grad():
        dense = (stored.dense() if value is None else value).to(stored.dtype)
    del layer._modules[name + SUFFIX]
    _refresh(layer)
    layer._parameters[name] = nn.Parameter(dense, requires_grad=stored.was_trained)


def _refresh(layer: nn.Module) -> None:
    if state_of(layer) is not None:
        refresh_class(layer)
    else:
        layer.__class__ = resting_class(layer)
