"""Both factors random: not an identity, for debugging and tests (`init_lora_weights=False` of PEFT's guide).

A ~ U(-1/sqrt(in), 1/sqrt(in)) and B ~ U(-1/sqrt(r), 1/sqrt(r)), as `nn.Linear` starts; both N(0, 1) for an embedding.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lora_plugins.plugins import InitContext, InitPlugin


class NoneInit(InitPlugin):
    """The adapted layer differs from the untouched one from the first step on."""

    name = "none"
    identity = False

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A and B with random values."""
        for factor in (context.A, context.B):
            if context.lookup:
                nn.init.normal_(factor, generator=context.generator)
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=context.generator)
        return {}
