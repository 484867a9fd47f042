"""Replaces parameters by stored weights, and stored weights by merged or dense ones."""

import torch
from torch import Tensor, nn

from lora_plugins.inplace.adapted_class import refresh_class
from lora_plugins.inplace.frozen_norm import own_mode, set_class
from lora_plugins.inplace.layer_state import state_of
from lora_plugins.inplace.library_weights import foreign_weights, forget_quantizers, put_dense_foreign
from lora_plugins.inplace.stored_class import resting_class
from lora_plugins.inplace.stored_weight import SUFFIX, StoredWeight, all_stored, stored_weight


def put_stored(layer: nn.Module, name: str, stored: StoredWeight) -> None:
    """Replaces a parameter, or another stored weight, by a stored weight."""
    layer._parameters[name] = None  # keeps its place among the others
    layer._modules[name + SUFFIX] = stored.train(own_mode(layer))
    stored.succeeded_by(None)
    _refresh(layer)


def put_dense(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replaces a stored weight by a parameter; safe to repeat if it is interrupted."""
    layer._parameters[name] = parameter
    layer._modules.pop(name + SUFFIX, None)
    _refresh(layer)


class Replacing:
    """Replaces stored weights by others with new values; those that layers share stay shared, also where it is stopped.

    Args:
        dequantize: Whether they become parameters; else they are stored as before.
    """

    def __init__(self, *, dequantize: bool) -> None:
        self._kind = nn.Parameter if dequantize else StoredWeight

    def put(self, layer: nn.Module, name: str, value: Tensor | None = None) -> None:
        """Replaces one stored weight.

        Args:
            layer: The layer.
            name: Attribute name of the weight.
            value: Its value from now on; by default the dense one that it has.
        """
        stored = stored_weight(layer, name)
        assert stored is not None
        new = stored.successor
        if not isinstance(new, self._kind):
            with torch.no_grad():
                new = self._new(stored, stored.dense() if value is None else value)
            stored.succeeded_by(new)
        if isinstance(new, StoredWeight):
            put_stored(layer, name, new)
        else:
            put_dense(layer, name, new)

    def _new(self, stored: StoredWeight, value: Tensor) -> nn.Parameter | StoredWeight:
        if self._kind is nn.Parameter:
            return nn.Parameter(value.to(stored.dtype), requires_grad=stored.was_trained)
        return StoredWeight(stored.storage, value, stored.dtype, device=stored.device, requires_grad=stored.was_trained)


def make_dense(model: nn.Module) -> None:
    """Makes all stored weights of a model, those of other libraries included, parameters with their dense values."""
    replacing = Replacing(dequantize=True)
    for layer, name, _ in [*all_stored(model)]:
        replacing.put(layer, name)
    for layer in model.modules():
        for name in foreign_weights(layer):
            put_dense_foreign(layer, name)
    forget_quantizers(model)


def _refresh(layer: nn.Module) -> None:
    if state_of(layer) is not None:
        refresh_class(layer)
    else:
        set_class(layer, resting_class(layer))
