"""Replaces parameters by stored weights, and stored weights by merged or dense ones."""

import torch
from torch import Tensor, nn

from lora_plugins.inplace.adapted_class import refresh_class
from lora_plugins.inplace.frozen_norm import own_mode, set_class
from lora_plugins.inplace.layer_state import state_of
from lora_plugins.inplace.library_weights import foreign_weights, put_dense_foreign
from lora_plugins.inplace.quantizer_marks import forget_quantizers
from lora_plugins.inplace.stored_class import resting_class
from lora_plugins.inplace.stored_weight import SUFFIX, StoredWeight, all_stored, stored_weight


def put_stored(layer: nn.Module, name: str, stored: StoredWeight) -> None:
    """Replaces a parameter, or another stored weight, by a stored weight."""
    layer._parameters[name] = None  # keeps its place among the others
    layer._modules[name + SUFFIX] = stored.train(own_mode(layer))
    stored.succeeded_by(None)
    _refresh(layer)


def replace_stored(layer: nn.Module, name: str, value: Tensor | None = None, *, dequantize: bool) -> None:
    """Replaces a stored weight by a parameter, to dequantize it, or by one that is stored as before.

    It gets a value, or keeps the dense one that it has. Layers that share it share the new one too, also after a stop.
    """
    stored = stored_weight(layer, name)
    assert stored is not None
    new = stored.successor
    if not isinstance(new, nn.Parameter if dequantize else StoredWeight):
        with torch.no_grad():
            new = _successor(stored, stored.dense() if value is None else value, dequantize)
        stored.succeeded_by(new)
    if isinstance(new, StoredWeight):
        put_stored(layer, name, new)
    else:
        _put_dense(layer, name, new)


def make_dense(model: nn.Module) -> None:
    """Makes all stored weights of a model, those of other libraries included, parameters with their dense values."""
    for layer, name, _ in [*all_stored(model)]:
        replace_stored(layer, name, dequantize=True)
    for layer in model.modules():
        for name in foreign_weights(layer):
            put_dense_foreign(layer, name)
    forget_quantizers(model)


def _put_dense(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replaces a stored weight by a parameter; safe to repeat if it is interrupted."""
    layer._parameters[name] = parameter
    layer._modules.pop(name + SUFFIX, None)
    _refresh(layer)


def _successor(stored: StoredWeight, value: Tensor, dequantize: bool) -> nn.Parameter | StoredWeight:
    if dequantize:
        return nn.Parameter(value.to(stored.dtype), requires_grad=stored.was_trained)
    return StoredWeight(stored.storage, value, stored.dtype, device=stored.device, requires_grad=stored.was_trained)


def _refresh(layer: nn.Module) -> None:
    if state_of(layer) is not None:
        refresh_class(layer)
    else:
        set_class(layer, resting_class(layer))
