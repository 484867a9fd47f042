"""Hooks of torch that compute a weight ahead of each forward: weight norm, spectral norm and pruning."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_Compute = Callable[[Any, nn.Module], Tensor]
_Remove = Callable[[nn.Module, str], object]

_KINDS: tuple[tuple[type[Any], str, _Compute, _Remove], ...] = (
    (WeightNorm, "name", lambda hook, layer: hook.compute_weight(layer), remove_weight_norm),
    (
        SpectralNorm,
        "name",
        lambda hook, layer: hook.compute_weight(layer, do_power_iteration=False),
        remove_spectral_norm,
    ),
    (prune.BasePruningMethod, "_tensor_name", lambda hook, layer: hook.apply_mask(layer), prune.remove),
)
"""Their classes, the attribute with the name of the weight, how it is computed, and what removes the hook."""


@dataclass(frozen=True)
class WeightHook:
    """One such hook of a layer.

    Args:
        weight: Attribute name of the weight.
        compute: Returns the weight, and sets nothing.
        remove: Removes the hook, and makes the weight a parameter.
    """

    weight: str
    compute: Callable[[], Tensor]
    remove: Callable[[], object]


def weight_hooks(layer: nn.Module) -> list[WeightHook]:
    """Returns the hooks of a layer that compute weights, in the order in which they run."""
    found = []
    for hook in layer._forward_pre_hooks.values():
        for kind, attribute, compute, remove in _KINDS:
            if isinstance(hook, kind):
                weight = getattr(hook, attribute)
                found.append(WeightHook(weight, partial(compute, hook, layer), partial(remove, layer, weight)))
    return found
