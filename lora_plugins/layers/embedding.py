"""Embeddings: rows of W (num_embeddings, dim) looked up by index.

The matrix view is Wᵀ, so A is (r, num_embeddings) and B is (dim, r), as in the reference implementation
(microsoft/LoRA, `loralib/layers.py`).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.kernels import direction_and_factors, rescaled_weight
from lora_plugins.plugins import BranchUse, ColumnMajorPlugin, LazyWeights, Rescaling, StackedAdapters, Term, add_delta
from lora_plugins.utils import in_full


class EmbeddingPlugin(ColumnMajorPlugin[nn.Embedding]):
    """`torch.nn.Embedding` and its subclasses; padding_idx, max_norm and sparse hold as in the untouched layer."""

    name = "embedding"
    module_type = nn.Embedding
    lookup = True
    branch_types: ClassVar = (nn.Embedding,)
    branch_use: ClassVar[BranchUse] = "always"
    branch_takes_delta = True
    branch_takes_rescaling = True

    def branch(self, layer: nn.Embedding, base: Mapping[str, Tensor], terms: Sequence[Term], input: Tensor) -> Tensor:
        """Looks `input`, any shape of indices, up in W and in the columns of A; returns `(..., dim)`.

        Options that concern whole rows of `W + ΔW` need those rows, so there the updated weight is formed. Autocast,
        which leaves an embedding alone, does not round the update either.
        """
        with in_full(terms[0].A):
            return self._look_up(layer, base, terms, input)

    def _look_up(self, layer: nn.Embedding, base: Mapping[str, Tensor], terms: Sequence[Term], input: Tensor) -> Tensor:
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            return self._look_up_rows(layer, base["weight"], terms, input)
        y = _base_rows(layer, base, input)
        if (rescaling := terms[0].rescaling) is not None:
            y = _rescaled_rows(self.to_matrix(base["weight"]), terms[0], rescaling, y, input)
        else:
            for term in terms:
                y = y + _update_rows(term, input).to(y.dtype)
        if layer.padding_idx is not None:
            # The padding row is looked up but never trained.
            y = torch.where((input == layer.padding_idx).unsqueeze(-1), y.detach(), y)
        return y

    def mixed(
        self, layer: nn.Embedding, base: Mapping[str, Tensor], adapters: StackedAdapters, input: Tensor
    ) -> Tensor:
        """Looks `input` up in the columns of each row's own A."""
        y = _base_rows(layer, base, input)
        indices = input.reshape(len(input), input.shape[1:].numel())
        rows = adapters.A.mT[adapters.index[:, None], indices]
        with in_full(rows):
            y = y + torch.bmm(rows, adapters.B[adapters.index].mT).view(y.shape).to(y.dtype)
        return adapters.rescale(y, None, -1)

    def mixing_problem(self, layer: nn.Embedding) -> str:
        """Returns why rows cannot be mixed: `max_norm`, which is of whole rows of one table."""
        return "" if layer.max_norm is None else "max_norm holds for the rows of one updated table"

    def _look_up_rows(self, layer: nn.Embedding, weight: Tensor, terms: Sequence[Term], input: Tensor) -> Tensor:
        for term in terms:
            if (rescaling := term.rescaling) is not None:
                whole = rescaled_weight(self.to_matrix(weight), term, rescaling)
                weight = self.from_matrix(whole, weight.shape).to(weight.dtype)
            else:
                weight = add_delta(weight, self.from_matrix(term.delta_weight(), weight.shape))
        # Not sparse: the gradient goes on to A and B, through products that sparse tensors do not have.
        return F.embedding(input, weight, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)


def _base_rows(layer: nn.Embedding, base: Mapping[str, Tensor], input: Tensor) -> Tensor:
    """Looks `input` up in W; of a stored W nothing else is made dense."""
    if isinstance(base, LazyWeights):
        return base.rows("weight", input)
    return F.embedding(input, base["weight"], layer.padding_idx, sparse=layer.sparse)


def _update_rows(term: Term, input: Tensor) -> Tensor:
    """Looks `input` up in the columns of an update."""
    if term.delta is not None:
        return F.embedding(input, term.delta.T)
    return F.linear(F.embedding(input, term.A.T), term.B) * term.scaling


def _rescaled_rows(weight: Tensor, term: Term, rescaling: Rescaling, rows: Tensor, input: Tensor) -> Tensor:
    """Adds an update to rows that were looked up, and rescales their sum by factors of the whole updated weight."""
    direction, factors = direction_and_factors(weight, term, rescaling)
    return (factors * (rows.to(direction.dtype) + _update_rows(term, input))).to(rows.dtype)
