"""LoftQ: a quantized base, and factors that make up for the quantization error.

Alternates Q ← quantize(W - s·B·A) and s·B·A ← the best rank-r approximation of W - Q, starting from A = B = 0, where
s is the adapter's scaling; the best iterate is kept, so the error never rises with more iterations.
Source: Li et al., LoftQ, arXiv 2310.08659, algorithm 1.

Where the base is really stored in fewer bytes (`LoraConfig(quantize=...)`), its storage is the quantizer, and Q is what
is stored. Else Q stays float, in the type of the base.

The changed base is a function of the original base and of the factors before the last quantization, which are stored
with the adapter: loading it onto the original base gives Q again without storing Q.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import check_count
from lora_plugins.inits.factors import without_product
from lora_plugins.plugins import InitContext, InitPlugin
from lora_plugins.utils import BITS, low_rank, quantize_dequantize


class LoftQInit(InitPlugin):
    """Options: `iterations`; and `bits` (2, 4 or 8) and `block_size` (values that share a scale) of a float base."""

    name = "loftq"
    options: ClassVar[Mapping[str, Any]] = {"bits": 4, "block_size": 64, "iterations": 1}
    changes_base = True
    storage_options = ("bits", "block_size")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses widths that no quantizer has, and counts below one."""
        for key, value in options.items():
            check_count(f"init_options: {key} of loftq", value)
        if options["bits"] not in BITS:
            raise ConfigError(f"init_options: loftq has {BITS} bits, not {options['bits']!r}.")

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Runs the alternation and fills A and B with its best iterate."""
        rank = context.A.shape[0]
        A, B = torch.zeros_like(context.A), torch.zeros_like(context.B)
        best, best_recipe = float("inf"), {"A": A, "B": B}
        for _ in range(context.options["iterations"]):
            recipe = {"A": A, "B": B}
            residual = context.weight - self._quantized(context, recipe)
            A, B = low_rank(residual, rank, context.scaling)
            error = float(torch.linalg.matrix_norm(residual - (B * context.scaling) @ A))
            if error < best:
                best, best_recipe = error, recipe
                context.A.copy_(A)
                context.B.copy_(B)
        # Zero factors, those before the first quantization, need no room in a file.
        return best_recipe if bool(best_recipe["B"].any()) else {}

    def changed_base(
        self, weight: Tensor, recipe: Mapping[str, Tensor], scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Quantizes what the factors of the recipe leave of the original weight."""
        target = self.base_to_store(weight, recipe, scaling, options)
        return quantize_dequantize(target, options["bits"], options["block_size"])

    def base_to_store(
        self, weight: Tensor, recipe: Mapping[str, Tensor], scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Returns what the factors of the recipe leave of the original weight, for the storage to quantize."""
        return without_product(weight, recipe, scaling) if recipe else weight

    def _quantized(self, context: InitContext, recipe: Mapping[str, Tensor]) -> Tensor:
        weight, scaling, options = context.weight, context.scaling, context.options
        if context.stored is None:
            return self.changed_base(weight, recipe, scaling, options)
        return context.stored(self.base_to_store(weight, recipe, scaling, options))
