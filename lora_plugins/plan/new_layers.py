"""Layers that look newly initialized and that nobody trains: a head that was forgotten.

Only their values show it, so there is a warning and nothing is changed. What looks new:

- weights that fill the interval of torch's default for linear layers and convolutions evenly, `1 / sqrt(fan_in)` to
  both sides; those of training have tails;
- a bias of zeros, as most models start theirs.

Only layers after the last adapted one are reported, and only if most of the adapted layers do not look new: in a model
that is new altogether, a head is no more forgotten than the rest. Where the author trains some of what is adapted and
has frozen other layers, these are to stay as they are: a teacher, or a momentum encoder with its head.
"""

import math
from collections.abc import Collection
from itertools import islice

import torch
from torch import Tensor, nn

from lora_plugins.inplace import foreign_kind, full_name, model_modules
from lora_plugins.plan.plan import Plan

_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that layers start in; torch compares no values of 8 bits, and whoever stores those has trained them."""
_FEW = 64
"""Elements of a weight below which its distribution tells nothing."""
_SAMPLE = 16
"""Adapted layers that are looked at."""


def forgotten_layers(target: nn.Module, plan: Plan, frozen: Collection[str] = ()) -> list[str]:
    """Returns the names of layers of an adapted model that look new and are neither adapted nor trained.

    Args:
        target: The model.
        plan: What is adapted and trained of it.
        frozen: The names of the parameters that its author had frozen.
    """
    layers = {entry.name: entry.module for entry in model_modules(target) if isinstance(entry.module, _TYPES)}
    adapted = {layer.name for layer in plan.layers}
    known = (layer for name, layer in layers.items() if name in adapted and _own(layer, "weight").numel() >= _FEW)
    looks = [_looks_new(layer) for layer in islice(known, _SAMPLE)]
    if not looks or 2 * sum(looks) >= len(looks):
        return []
    served = adapted | {name.rpartition(".")[0] for name in plan.trained}
    held = {id(each) for name in served & layers.keys() for each in layers[name].parameters(recurse=False)}
    moving = {name: layer for name, layer in layers.items() if not _is_frozen(name, layer, frozen)}
    if adapted & moving.keys():
        layers = moving
    names = list(layers)
    last = max(names.index(name) for name in adapted if name in layers)
    rest = {name: layers[name] for name in names[last + 1 :]}
    return [
        name
        for name, layer in rest.items()
        if held.isdisjoint(map(id, layer.parameters(recurse=False))) and _looks_new(layer)  # tied ones are trained too
    ]


def _is_frozen(name: str, layer: nn.Module, frozen: Collection[str]) -> bool:
    own = [full_name(name, key) for key, _ in layer.named_parameters() if not key.startswith("lora_")]
    return bool(own) and all(each in frozen for each in own)


def _own(layer: nn.Module, name: str) -> Tensor:
    """Returns a layer's own parameter; an empty tensor where it is computed, on meta, or not of plain floats."""
    value = dict(layer.named_parameters(recurse=False)).get(name)
    if value is None or value.is_meta or foreign_kind(value) is not None or value.dtype not in _PLAIN:
        return torch.empty(0, device="cpu")
    return value.detach()


def _looks_new(layer: nn.Module) -> bool:
    weight, bias = _own(layer, "weight"), _own(layer, "bias")
    if not weight.numel():
        return False
    return bool(bias.numel() and not bias.any()) or (weight.numel() >= _FEW and _is_even(weight))


def _is_even(weight: Tensor) -> bool:
    """Whether values fill the interval of torch's default evenly: its ends are reached, and the deviation fits."""
    bound = 1 / math.sqrt(weight[0].numel())
    within = 0.9 * bound < float(weight.abs().max()) <= 1.001 * bound
    spread = float(weight.float().std()) / (bound / math.sqrt(3))
    return within and abs(spread - 1) < 4 / math.sqrt(weight.numel())
