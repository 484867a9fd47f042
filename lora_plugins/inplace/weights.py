"""The weights of a layer: the raw one, the one with merged updates, and the effective one.

- *raw*: the untouched weight, a parameter, the dense value of a stored weight, or what a parametrization or a hook of
  the layer computes;
- *with merged*: the weight that active updates are added to: the raw one, or one with merged updates in it;
- *effective*: `W + ΔW` over the active adapters, which `layer.weight` answers with; see `deltas`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins.errors import StateError
from lora_plugins.inplace.layer_state import base_class_of, layer_state
from lora_plugins.inplace.library_kinds import foreign_kind
from lora_plugins.inplace.made_again import note
from lora_plugins.inplace.stored_weight import stored_weight
from lora_plugins.inplace.weight_hooks import weight_hooks
from lora_plugins.plugins import LazyWeights
from lora_plugins.utils import autocast_dtype, ending


def raw_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the untouched weight: a parameter, a stored one made dense, or what the layer computes.

    Raises:
        LostWeightError: If something has taken it away since the layer was adapted.
    """
    for store in (layer._parameters, layer._buffers, layer.__dict__):
        value = store.get(name)
        if value is not None:
            return _dense_of(layer, value)
    stored = stored_weight(layer, name)
    if stored is not None:
        return stored.dense()
    for kind in base_class_of(layer).__mro__:
        if name in kind.__dict__:  # which all compilers can follow, and not all of them `vars`
            return cast(Tensor, kind.__dict__[name].fget(layer))
    raise LostWeightError(layer, name)


class LostWeightError(StateError, AttributeError):
    """Other code has removed the weight of an adapted layer, to compute it from now on.

    For `hasattr` the layer does not have it, as whoever shards parameters expects.

    Args:
        layer: The layer.
        name: Attribute name of the weight.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(
            f"{name!r} of {layer_state(layer).name!r} was taken away while the layer is adapted, as weight_norm and "
            "spectral_norm of torch.nn.utils do, to compute it from now on. Build the model again, and call them "
            "before it is adapted."
        )


def detached_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the raw weight, detached, without letting a parametrization move its own statistics.

    What a hook computes is computed again: the layer has it of its last forward, before it was loaded, say.
    """
    parameter = layer._parameters.get(name)
    if parameter is not None:
        with torch.no_grad():
            return _dense_of(layer, parameter).detach()
    with frozen_statistics(layer), torch.no_grad():
        hook = next((hook for hook in weight_hooks(layer) if hook.weight == name), None)
        return (hook.compute() if hook and name in layer.__dict__ else raw_weight(layer, name)).detach()


def _dense_of(layer: nn.Module, value: Any) -> Tensor:
    """Returns a weight, made dense where another library has quantized it."""
    kind = foreign_kind(value)
    if kind is None:
        return cast(Tensor, value)

    def make() -> Tensor:
        with torch.no_grad():
            return kind.dense(layer, value)

    return note(make(), make)


def frozen_statistics(layer: nn.Module) -> AbstractContextManager[None]:
    """Keeps what computes a layer's weights from moving statistics of its own, as spectral norm does in training."""
    parametrizations = layer._modules.get("parametrizations")
    return held_in_eval_mode([layer, *(parametrizations.modules() if parametrizations else ())])


@contextmanager
def held_in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Holds modules, and not what is in them, in eval mode for the duration of the block."""
    moving = [module for module in modules if module.training]

    def put_back() -> None:
        for module in moving:
            module.training = True

    with ending(put_back):
        for module in moving:
            module.training = False
        yield


def weight_key(layer: nn.Module, name: str) -> int | None:
    """Identifies what is behind a weight, the same for all layers that share it; None if it is computed."""
    parameter = own_parameter(layer, name)
    held = stored_weight(layer, name) if parameter is None else parameter
    return None if held is None else id(held)


def own_parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    """Returns the parameter of that attribute name; None if the weight is not one."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else None  # noqa: SIM401  # of a TorchScript module, it has no `get`


def weight_with_merged(layer: nn.Module, name: str) -> Tensor:
    """Returns the weight that active updates are added to: the raw one, or one with merged updates in it.

    Under autocast, one of 8 bits is in the type that autocast computes in, which holds all its values: torch has no
    sums of 8 bits, and an update that is rounded to them is mostly lost.
    """
    merged = layer_state(layer).merged.get(name)
    weight = raw_weight(layer, name) if merged is None else merged
    if weight.dtype.itemsize > 1 or not layer_state(layer).active:
        return weight
    return weight.to(autocast_dtype(weight) or weight.dtype)


class LazyWeightsOf(LazyWeights):
    """The weights that active updates of a layer are added to, of which some are stored."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        self._layer, self._names = layer, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return weight_with_merged(self._layer, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Returns these rows, contiguous as lookups of torch are; of a stored weight, no others are made dense."""
        index = index.contiguous()
        stored = stored_weight(self._layer, name)
        if stored is None or name in layer_state(self._layer).merged:
            return self[name][index]
        return stored.rows(index)


def weights_of(layer: nn.Module, names: tuple[str, ...]) -> Mapping[str, Tensor]:
    """Returns the weights that active updates are added to, by attribute name."""
    return {name: weight_with_merged(layer, name) for name in names}
