"""DoRA (Liu et al., arXiv 2402.09353): direction and magnitude of a weight are trained apart.

    W' = m · V / ‖V‖,   V = W + scaling · B·A

with one magnitude and one norm for each output, m starting at ‖V‖. As section 4.3 of the paper proposes, the norm is
held constant in the gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_plugins.plugins import VariantPlugin


class DoraVariant(VariantPlugin):
    """DoRA."""

    name = "dora"

    def shapes(self, rows: int, columns: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of one magnitude for each output."""
        return {"magnitude": (rows,)}

    def first_values(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Mapping[str, Tensor]:
        """Returns the norms of the rows, so that the weight is what it was."""
        return {"magnitude": _norms(torch.addmm(weight, B, A, alpha=scaling))}

    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float, own: Mapping[str, Tensor]) -> Tensor:
        """Returns `m · V / ‖V‖ - W`."""
        direction = torch.addmm(weight, B, A, alpha=scaling)
        return self.row_factors(direction.detach(), own)[:, None] * direction - weight

    def row_factors(self, direction: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Returns `m / ‖V‖`."""
        return own["magnitude"] / _norms(direction)


def _norms(matrix: Tensor) -> Tensor:
    """Returns the norms of the rows; a row of zeros has no direction and counts as one of norm 1."""
    norms = torch.linalg.vector_norm(matrix, dim=1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))
