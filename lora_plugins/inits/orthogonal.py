"""Orthogonal: both factors random and away from zero, and yet B·A = 0.

Of a random orthogonal matrix (r, r), P are the first, third, ... rows and O the others, so that O·Pᵀ = 0. With
G (in, r/2) and H (out, r/2) standard normal: A = (G·P)ᵀ/10, B = H·O/10, and B·A = H·(O·Pᵀ)·Gᵀ/100 = 0.
Source: datta0.github.io, "Rethinking LoRA initialization", section "Orthogonal initialization".
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_plugins.errors import TargetError
from lora_plugins.plugins import InitContext, InitPlugin


class OrthogonalInit(InitPlugin):
    """An identity, up to rounding, in which A and B both get a gradient from the first step on. The rank is even."""

    name = "orthogonal"

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A and B with random values in orthogonal halves of the r dimensions between them.

        Raises:
            TargetError: If the rank is odd, naming the layer.
        """
        rank, columns = context.A.shape
        if rank % 2:
            raise TargetError(
                f"{context.layer!r}: the init 'orthogonal' halves the rank, so r is even; it is {rank}. Change r, or "
                "give the layer another by rank_pattern."
            )

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=context.generator, dtype=context.A.dtype, device="cpu")

        Q, _ = torch.linalg.qr(normal(rank, rank))
        context.A.copy_((normal(columns, rank // 2) @ Q[0::2]).T / 10)
        context.B.copy_(normal(rank // 2, context.B.shape[0]).T @ Q[1::2] / 10)
        return {}
