"""The layers to adapt if a configuration names none: attention projections, or else the dense layers.

Attention projections are what the LoRA paper adapts (Hu et al., arXiv 2106.09685, section 4.2). In networks without
attention, dense layers are adapted: convolutions without groups, and the linear layers that act as 1x1 convolutions in
ConvNeXt and mixers. Depthwise convolutions are left out: a low rank of their few weights per channel saves little.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lora_plugins.tasks.models.network import is_inside

ATTENTION = re.compile("attn|attention", re.IGNORECASE)
NOT_A_PROJECTION = re.compile("position|pos_|rel_|cpb|sequence_reduction|distance|meta_mlp", re.IGNORECASE)
"""Layers inside attention that are no projection of it: they compute position biases, or reduce the sequence."""


def default_targets(network: nn.Module, heads: Sequence[str]) -> list[str]:
    """Names for `target_modules`, relative to the network, as short as they can be without matching more.

    Args:
        network: The network.
        heads: Names of the modules that are trained in full.

    Returns:
        The names; none for a network with neither kind of layer.
    """
    layers = {name: layer for name, layer in network.named_modules() if name and not is_inside(f"{name}.", heads)}
    chosen = [name for name, layer in layers.items() if _is_projection(name, layer)]
    chosen = chosen or [name for name, layer in layers.items() if _is_dense(layer)]
    return _shortest_endings(chosen, layers)


def _is_projection(name: str, layer: nn.Module) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return True
    # A subclass of Linear that nn.MultiheadAttention holds as `out_proj`: it goes with its parent.
    if not isinstance(layer, nn.Linear) or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    in_attention = any(ATTENTION.search(part) for part in name.split("."))
    return in_attention and not NOT_A_PROJECTION.search(name)


def _is_dense(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _shortest_endings(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """The shortest endings, in whole components, that match what was chosen and nothing else."""
    others = set(names) - set(chosen)
    endings: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            ending = ".".join(parts[start:])
            readable = not parts[start].isdigit()
            if readable and not any(other == ending or other.endswith(f".{ending}") for other in others):
                break
        endings[ending] = None
    return list(endings)
