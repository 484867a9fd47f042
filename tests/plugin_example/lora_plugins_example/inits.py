"""Orthonormal: one factor has orthonormal rows or columns, the other is zero.

Source: Saxe et al., Exact solutions to the nonlinear dynamics of learning in deep linear networks, arXiv 1312.6120.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_plugins import ConfigError, InitContext, InitPlugin


class OrthonormalInit(InitPlugin):
    """An identity whose random factor has orthonormal rows or columns. Option: `gain`, its singular values."""

    name = "orthonormal"
    options: ClassVar[Mapping[str, Any]] = {"gain": 1.0}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses a gain that would leave both factors zero."""
        if options["gain"] == 0:
            raise ConfigError("init_options: gain of orthonormal is 0, so nothing would ever be trained.")

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills one factor with an orthonormal matrix and the other with zeros."""
        random, zero = (context.B, context.A) if context.lookup else (context.A, context.B)
        nn.init.orthogonal_(random, gain=context.options["gain"], generator=context.generator)
        nn.init.zeros_(zero)
        return {}
