"""What files of adapters for diffusion pipelines share, those of diffusers and of the WebUI."""

import math
from collections.abc import Mapping
from dataclasses import replace

from lora_plugins.formats.portable import PortableAdapter, PortableLayer

_LAYER_TYPES = frozenset({"", "linear", "conv1d", "conv2d", "conv3d"})


def refusals_of_pipelines(adapter: PortableAdapter) -> list[str]:
    """Returns what such files have no form for."""
    return [
        *(
            f"{name!r}: a layer of type {layer.layer_type!r} has no form there"
            for name, layer in adapter.layers.items()
            if layer.layer_type not in _LAYER_TYPES
        ),
        *(
            f"{name!r}: the output projection of an attention, which no library calls by itself, has no form there"
            for name, layer in adapter.layers.items()
            if layer.in_attention
        ),
        *(f"{name!r}: what is trained in full has no form there" for name in adapter.values),
    ]


def without_rslora(adapter: PortableAdapter) -> Mapping[str, PortableLayer]:
    """Returns the layers with alphas that scale by `alpha / r`."""
    if not adapter.use_rslora:
        return adapter.layers
    return {name: replace(layer, alpha=layer.alpha * math.sqrt(layer.r)) for name, layer in adapter.layers.items()}
