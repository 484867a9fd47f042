"""Kaiming-uniform A, zero B: the start of the reference implementation.

A ~ U(-1/sqrt(in), 1/sqrt(in)), which is `kaiming_uniform_(a=sqrt(5))`, and B = 0. For an embedding, A = 0 and
B ~ N(0, 1). Source: Hu et al., arXiv 2106.09685, and its implementation microsoft/LoRA, `loralib/layers.py`.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lora_plugins.plugins import InitContext, InitPlugin


class KaimingInit(InitPlugin):
    """The default: an identity, with A as `nn.Linear` starts its own weight."""

    name = "kaiming"

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A by Kaiming's rule and B with zeros, or for a lookup layer A with zeros and B by N(0, 1)."""
        if context.lookup:
            nn.init.zeros_(context.A)
            nn.init.normal_(context.B, generator=context.generator)
        else:
            nn.init.kaiming_uniform_(context.A, a=math.sqrt(5), generator=context.generator)
            nn.init.zeros_(context.B)
        return {}
