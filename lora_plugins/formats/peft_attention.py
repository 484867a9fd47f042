"""`nn.MultiheadAttention` in PEFT: one adapter of one rank for its projections, the output projection twice.

PEFT adapts `in_proj_weight` and `out_proj` together or not at all. Where we adapt one of them, the other gets an A and
a B of zeros; where ranks or scalings differ, A and B are padded and scaled to one.

PEFT keeps `fan_in_fan_out` in its config while it goes from layer to layer: a `Conv1D` sets it, a linear layer takes it
back, and an output projection is adapted by what the layer before has left. Then its update is the transposed one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch

from lora_plugins.config import rank_divisor
from lora_plugins.formats.portable import PortableAdapter, PortableLayer

_APPLIED = 2
"""How often PEFT applies the update of the output projection."""

_OUT = "out_proj"


def with_attention(adapter: PortableAdapter) -> Mapping[str, PortableLayer]:
    """Returns the layers of an adapter with both projections of each attention, as PEFT has them."""
    layers = dict(adapter.layers)
    divisor = partial(rank_divisor, use_rslora=adapter.use_rslora)
    for name in _attentions(layers):
        inner, outer = layers.get(name), layers.get(f"{name}.{_OUT}")
        known = inner or outer
        assert known is not None
        inner = inner or _idle(known, 3 * known.A.shape[1])
        outer = outer or _idle(known, known.A.shape[1])
        r = max(inner.r, outer.r)
        scaling = inner.alpha / divisor(inner.r)
        factor = outer.alpha / divisor(outer.r) / scaling
        alpha = inner.alpha if inner.r == r else scaling * divisor(r)
        layers[name] = replace(_padded(inner, r), alpha=alpha, layer_type="multihead_attention", in_attention=False)
        outer = _padded(outer, r)
        B = outer.B * factor
        layers[f"{name}.{_OUT}"] = replace(outer, B=B, alpha=alpha, layer_type="linear", in_attention=True)
    return layers


def as_applied(layers: Mapping[str, PortableLayer]) -> dict[str, PortableLayer]:
    """Returns the layers as a file has them: B of an output projection is divided by how often PEFT applies it."""
    return {
        name: replace(layer, B=layer.B / _APPLIED) if layer.in_attention else layer for name, layer in layers.items()
    }


def with_transposed(
    layers: Mapping[str, PortableLayer], visited: Iterable[tuple[str, str]], *, fan_in_fan_out: bool
) -> dict[str, PortableLayer]:
    """Returns layers with those output projections transposed that PEFT transposes.

    It visits the layers that it adapts by themselves in the order of the model, here by name and layer type, and begins
    with the `fan_in_fan_out` of its config.
    """
    found = dict(layers)
    for name, layer_type in visited:
        outer = found.get(f"{name}.{_OUT}")
        if layer_type == "multihead_attention" and fan_in_fan_out and outer is not None:
            found[f"{name}.{_OUT}"] = replace(outer, A=outer.B.T.contiguous(), B=outer.A.T.contiguous())
        elif layer_type in ("linear", "transformers_conv1d"):
            fan_in_fan_out = layer_type == "transformers_conv1d"
    return found


def _attentions(layers: Mapping[str, PortableLayer]) -> list[str]:
    own = [name for name, layer in layers.items() if layer.layer_type == "multihead_attention"]
    parents = [name.rpartition(".")[0] for name, layer in layers.items() if layer.in_attention]
    return list(dict.fromkeys([*own, *parents]))


def _idle(other: PortableLayer, rows: int) -> PortableLayer:
    """Returns a layer that changes nothing, and could be trained."""
    return replace(other, B=other.B.new_zeros(rows, other.r))


def _padded(layer: PortableLayer, r: int) -> PortableLayer:
    extra = r - layer.r
    pad = torch.nn.functional.pad
    return replace(layer, A=pad(layer.A, (0, 0, 0, extra)), B=pad(layer.B, (0, extra)))
