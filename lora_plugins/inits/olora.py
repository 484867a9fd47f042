"""OLoRA: orthonormal B, from the QR decomposition of the weight.

W = Q·R. B = Q[:, :r], A = R[:r], and with s the adapter's scaling the base becomes W - s·B·A.
Source: Büyükakyüz, OLoRA, arXiv 2406.01775, algorithm 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_plugins.inits.factors import TakenOut, fill_rest, recipe_of
from lora_plugins.plugins import InitContext


class OloraInit(TakenOut):
    """B starts with orthonormal columns, and `B @ A` as a part of the weight."""

    name = "olora"

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A and B from the QR decomposition of the weight."""
        Q, R = torch.linalg.qr(context.weight)
        kept = min(context.A.shape[0], Q.shape[1])
        context.B[:, :kept] = Q[:, :kept]
        context.A[:kept] = R[:kept]
        fill_rest(context, kept)
        return recipe_of(context)
