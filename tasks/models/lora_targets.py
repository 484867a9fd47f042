"""The layers to adapt if a configuration names none: the dense ones, which hold nearly all weights of a network.

They are attention projections, the linear layers of MLPs, patch embeddings, and convolutions without groups. On the
attention projections alone, which the LoRA paper adapts (Hu et al., arXiv 2106.09685, section 4.2), a small vision
transformer ended 4 to 5 points lower (docs/settings.md). Depthwise convolutions are left out: a low rank of their few
weights per channel saves little, and they break first at a high rate.
"""

import re
from collections.abc import Sequence

from torch import nn

from lora_plugins.plan import exact_expression, shortest_ends
from lora_plugins.tasks.models.network import is_inside

OF_POSITIONS = re.compile(
    "(?<![a-z])(pos|position|positional|rel|relative|cpb|distance|meta_mlp)(?![a-z])", re.IGNORECASE
)
"""Layers that compute position biases, from coordinates and not from images."""


def default_targets(network: nn.Module, heads: Sequence[str]) -> list[str] | str:
    """Names for `target_modules`, relative to the network, as short as they can be without matching more.

    Args:
        network: The network.
        heads: Names of the modules that are trained in full.

    Returns:
        The names, or an expression where no names match them alone; empty for a network without dense layers.
    """
    layers = {name: layer for name, layer in network.named_modules() if name and not is_inside(f"{name}.", heads)}
    chosen = [name for name, layer in layers.items() if _is_dense(layer) and not OF_POSITIONS.search(name)]
    ends = shortest_ends(chosen, layers)
    return ends or "|".join(map(exact_expression, chosen))


def _is_dense(layer: nn.Module) -> bool:
    # A subclass of Linear that nn.MultiheadAttention holds as `out_proj`: it goes with its parent.
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    is_convolution = isinstance(layer, nn.Conv2d) and layer.groups == 1
    return is_convolution or isinstance(layer, nn.Linear | nn.MultiheadAttention)
