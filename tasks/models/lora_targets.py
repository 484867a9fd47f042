"""Which layers to adapt where a configuration names none: attention projections, or else the convolutions.

Attention projections are what the LoRA paper adapts (Hu et al., arXiv 2106.09685, section 4.2). Networks without
attention have their dense layers adapted: full convolutions, and the linear layers that stand for 1x1 convolutions in
ConvNeXt and mixers. Depthwise convolutions are left alone: their few weights a channel leave a low rank little to save.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lora_plugins.tasks.models.network import is_inside

ATTENTION = re.compile("attn|attention", re.IGNORECASE)
# Inside attention, but no projection of it: what turns relative positions into a bias.
POSITIONS = re.compile("position|pos_|rel_|cpb|sequence_reduction|distance|meta_mlp", re.IGNORECASE)


def default_targets(network: nn.Module, heads: Sequence[str]) -> list[str]:
    """Names for `target_modules`, relative to the network, as short as they can be without matching more.

    Args:
        network: The network.
        heads: Names of the modules that are trained in full.

    Returns:
        The names; none for a network in which there is nothing of either kind.
    """
    layers = {name: layer for name, layer in network.named_modules() if name and not is_inside(f"{name}.", heads)}
    chosen = [name for name, layer in layers.items() if _projects_attention(name, layer)]
    chosen = chosen or [name for name, layer in layers.items() if _is_dense(layer)]
    return _shortened(chosen, layers)


def _projects_attention(name: str, layer: nn.Module) -> bool:
    inside = [part for part in name.split(".") if ATTENTION.search(part)]
    if isinstance(layer, nn.MultiheadAttention):
        return True
    projects = isinstance(layer, nn.Linear) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return projects and bool(inside) and not POSITIONS.search(name)


def _is_dense(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _shortened(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
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
