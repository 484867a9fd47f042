"""`nn.MultiheadAttention`: the projections of query, key and value that it keeps as bare weights.

Its output projection is a Linear child of its own and is adapted as one: the attention reads `out_proj.weight`,
which answers with the updated weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.layers.linear import thirds
from lora_plugins.plugins import RowMajorPlugin, Slot

_SEPARATE = {"q": "q_proj_weight", "k": "k_proj_weight", "v": "v_proj_weight"}


class MultiheadAttentionPlugin(RowMajorPlugin[nn.MultiheadAttention]):
    """`torch.nn.MultiheadAttention`, with one width for query, key and value or with three."""

    name = "multihead_attention"
    module_type = nn.MultiheadAttention

    def slots(self, layer: nn.MultiheadAttention) -> Sequence[Slot]:
        """One slot over the fused projection, or one for each separate projection."""
        if layer._qkv_same_embed_dim:
            return (Slot("in_proj_weight"),)
        return tuple(self.parts(layer).values())

    def parts(self, layer: nn.MultiheadAttention) -> Mapping[str, Slot]:
        """The thirds of the fused projection, or the separate projections."""
        if layer._qkv_same_embed_dim:
            return thirds("in_proj_weight", 3 * layer.embed_dim)
        return {part: Slot(tensor, part) for part, tensor in _SEPARATE.items()}

    def biases(self, layer: nn.MultiheadAttention) -> Sequence[str]:
        """The bias of the three projections."""
        return ("in_proj_bias",)

    def inputs(
        self,
        layer: nn.MultiheadAttention,
        slot: Slot,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The rows of what the slot projects; of all three for the fused projection, once where they are the same."""
        given = {"q": query, "k": key, "v": value}
        seen = [given[slot.part]] if slot.part else list({id(x): x for x in given.values()}.values())
        return torch.cat([x.flatten(0, -2) for x in seen])
