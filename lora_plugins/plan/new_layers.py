"""Layers that look newly initialized and that nobody trains: a head that was forgotten.

Nothing but the values tells it, so it is said and nothing is done. What looks new:

- weights that fill the interval of torch's default for linear layers and convolutions evenly, `1 / sqrt(fan_in)` to
  both sides; those of training have tails;
- a bias of zeros, as most models start theirs.

It is said only of what comes after the last adapted layer, and only where most of the adapted layers do not look new:
in a model that is new altogether, a head is no more forgotten than the rest.
"""

import math
from itertools import islice

import torch
from torch import Tensor, nn

from lora_plugins.inplace import foreign_kind, model_modules
from lora_plugins.plan.plan import Plan

_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FEW = 64
"""Elements of a weight below which its distribution tells nothing."""
_SAMPLE = 16
"""Adapted layers that are looked at."""


def forgotten_layers(target: nn.Module, plan: Plan) -> list[str]:
    """Returns the names of layers that look new and are neither adapted nor trained.

    Args:
        target: The adapted model.
        plan: That of its adapter.
    """
    layers = {entry.name: entry.module for entry in model_modules(target) if isinstance(entry.module, _TYPES)}
    adapted = {layer.name for layer in plan.layers}
    known = (layer for name, layer in layers.items() if name in adapted and _weight_of(layer).numel() >= _FEW)
    looks = [_looks_new(layer) for layer in islice(known, _SAMPLE)]
    if not looks or 2 * sum(looks) >= len(looks):
        return []
    names = list(layers)
    last = max(names.index(name) for name in adapted if name in layers)
    trained = {name.rpartition(".")[0] for name in plan.trained}
    return [name for name in names[last + 1 :] if name not in trained and _looks_new(layers[name])]


def _weight_of(layer: nn.Module) -> Tensor:
    """Returns a layer's own weight; nothing where it is computed or quantized, or not there yet."""
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.is_meta or foreign_kind(weight) is not None or not weight.is_floating_point():
        return torch.empty(0, device="cpu")
    return weight.detach()


def _looks_new(layer: nn.Module) -> bool:
    weight, bias = _weight_of(layer), dict(layer.named_parameters(recurse=False)).get("bias")
    if not weight.numel():
        return False
    return (bias is not None and not bias.any()) or (weight.numel() >= _FEW and _is_even(weight))


def _is_even(weight: Tensor) -> bool:
    """Whether values fill the interval of torch's default evenly: its ends are reached, and the deviation fits."""
    bound = 1 / math.sqrt(weight[0].numel())
    within = 0.9 * bound < float(weight.abs().max()) <= 1.001 * bound
    spread = float(weight.float().std()) / (bound / math.sqrt(3))
    return within and abs(spread - 1) < 4 / math.sqrt(weight.numel())
