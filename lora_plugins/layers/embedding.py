"""Embeddings: rows of W (num_embeddings, dim) looked up by index.

The matrix view is Wᵀ, so A is (r, num_embeddings) and B is (dim, r), as in the reference implementation
(microsoft/LoRA, `loralib/layers.py`).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.plugins import BranchUse, ColumnMajorPlugin, LazyWeights, StackedAdapters, Term, add_delta


class EmbeddingPlugin(ColumnMajorPlugin[nn.Embedding]):
    """`torch.nn.Embedding` and its subclasses; padding_idx, max_norm and sparse hold as in the untouched layer."""

    name = "embedding"
    module_type = nn.Embedding
    lookup = True
    branch_types: ClassVar = (nn.Embedding,)
    branch_use: ClassVar[BranchUse] = "always"

    def branch(self, layer: nn.Embedding, base: Mapping[str, Tensor], terms: Sequence[Term], input: Tensor) -> Tensor:
        """Looks `input`, any shape of indices, up in W and in the columns of A; returns `(..., dim)`.

        Options that concern whole rows of `W + ΔW` need those rows, so there the updated weight is formed.
        """
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            return self._look_up_rows(layer, base["weight"], terms, input)
        y = _base_rows(layer, base, input)
        for term in terms:
            rows = F.embedding(input, term.A.T)
            update = F.linear(rows, term.B) * term.scaling
            if layer.padding_idx is not None:
                # The padding row is looked up but never trained.
                padding = (input == layer.padding_idx).unsqueeze(-1)
                update = torch.where(padding, update.detach(), update)
            y = y + update.to(y.dtype)
        return y

    def mixed(
        self, layer: nn.Embedding, base: Mapping[str, Tensor], adapters: StackedAdapters, input: Tensor
    ) -> Tensor:
        """Looks `input` up in the columns of each row's own A."""
        if layer.max_norm is not None:
            raise NotImplementedError("Embedding with max_norm renormalizes one table; it cannot mix adapters.")
        y = _base_rows(layer, base, input)
        indices = input.reshape(len(input), input.shape[1:].numel())
        rows = adapters.A.mT[adapters.index[:, None], indices]
        return y + torch.bmm(rows, adapters.B[adapters.index].mT).view(y.shape).to(y.dtype)

    def _look_up_rows(self, layer: nn.Embedding, weight: Tensor, terms: Sequence[Term], input: Tensor) -> Tensor:
        for term in terms:
            weight = add_delta(weight, self.from_matrix(term.delta_weight(), weight.shape))
        # Not sparse: the gradient goes on to A and B, through products that sparse tensors do not have.
        return F.embedding(input, weight, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)


def _base_rows(layer: nn.Embedding, base: Mapping[str, Tensor], input: Tensor) -> Tensor:
    """Looks `input` up in W; of a stored W nothing else is made dense."""
    if isinstance(base, LazyWeights):
        return base.rows("weight", input)
    return F.embedding(input, base["weight"], layer.padding_idx, sparse=layer.sparse)
