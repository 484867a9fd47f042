"""OLoRA: orthonormal B, from the QR decomposition of the weight.

W = Q·R. B = Q[:, :r], A = R[:r], and with s the adapter's scaling the base becomes W - s·B·A.
Source: Büyükakyüz, OLoRA, arXiv 2406.01775, algorithm 1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_plugins.inits.factors import fill_rest, recipe_of, without_product
from lora_plugins.plugins import InitContext, InitPlugin


class OloraInit(InitPlugin):
    """B starts with orthonormal columns, and `B @ A` as a part of the weight."""

    name = "olora"
    changes_base = True

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A and B from the QR decomposition of the weight."""
        Q, R = torch.linalg.qr(context.weight)
        kept = min(context.A.shape[0], Q.shape[1])
        context.B[:, :kept] = Q[:, :kept]
        context.A[:kept] = R[:kept]
        fill_rest(context, kept)
        return recipe_of(context)

    def changed_base(
        self, weight: Tensor, recipe: Mapping[str, Tensor], scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Takes the first update out of the weight."""
        return without_product(weight, recipe, scaling)
