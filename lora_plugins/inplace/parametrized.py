"""Weights that a parametrization or a hook computes, turned into plain parameters."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_plugins.errors import MergeError
from lora_plugins.inplace.layer_state import base_class_of
from lora_plugins.inplace.weight_hooks import weight_hooks
from lora_plugins.inplace.weights import frozen_statistics


def recompute(layer: nn.Module) -> None:
    """Computes the weights of hooks now; without that, these are those of the last forward."""
    with frozen_statistics(layer):
        for hook in weight_hooks(layer):
            setattr(layer, hook.weight, hook.compute())


def make_plain(layer: nn.Module, name: str, value: Tensor) -> None:
    """Turns a computed weight of a layer without adapters into a parameter of some value.

    Raises:
        MergeError: As `remover` does.
    """
    remover(layer, name, name)()
    layer.register_parameter(name, nn.Parameter(value))


def remover(layer: nn.Module, name: str, full_name: str) -> Callable[[], object]:
    """Returns a function that removes the parametrization or hook by which a weight is computed.

    Raises:
        MergeError: If it is not known how the weight is computed.
    """
    known = _known_remover(layer, name)
    if known is not None:
        return known
    raise MergeError(
        f"{full_name!r} is not a parameter of its {base_class_of(layer).__name__}: it is a buffer, or computed in an "
        "unknown way, so it cannot be merged for good. Make it a parameter first, or use merge_adapter(), which can be "
        "taken back."
    )


def can_be_plain(layer: nn.Module, name: str) -> bool:
    """Whether it is known how a computed weight of a layer is computed, so that it can become a parameter."""
    return _known_remover(layer, name) is not None


def _known_remover(layer: nn.Module, name: str) -> Callable[[], object] | None:
    if parametrize.is_parametrized(layer, name):
        return partial(_remove_parametrization, layer, name)
    return next((hook.remove for hook in weight_hooks(layer) if hook.weight == name), None)


def _remove_parametrization(layer: nn.Module, name: str) -> None:
    """Drops a parametrization and its tensors; torch's own function would break copies that share the class."""
    parametrizations = layer.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    del parametrizations[name]
    parametrized = type(layer)
    if len(parametrizations):
        rest = {key: value for key, value in vars(parametrized).items() if key != name}
        layer.__class__ = type(parametrized.__name__, parametrized.__bases__, rest)
    else:
        del layer.parametrizations
        layer.__class__ = parametrized.__bases__[0]
