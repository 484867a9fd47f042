"""Gaussian A of standard deviation 1/r, zero B: the start of the diffusers library.

A ~ N(0, 1/r²), B = 0; for an embedding the other way round. Source: huggingface/diffusers, `LoRALinearLayer`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lora_plugins.plugins import InitContext, InitPlugin


class GaussianInit(InitPlugin):
    """An identity whose random factor has a standard deviation of 1/r."""

    name = "gaussian"

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills one factor by N(0, 1/r²) and the other with zeros."""
        random, zero = (context.B, context.A) if context.lookup else (context.A, context.B)
        nn.init.normal_(random, std=1 / context.A.shape[0], generator=context.generator)
        nn.init.zeros_(zero)
        return {}
