"""What several inits share: an option, filling ranks that a matrix does not have, and the changed base."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import is_whole
from lora_plugins.plugins import InitContext, InitPlugin
from lora_plugins.utils import in_float64


class TakenOut(InitPlugin):
    """An init whose first `B @ A` is taken out of the base, so that the model starts as it was."""

    changes_base = True

    def changed_base(
        self, weight: Tensor, recipe: Mapping[str, Tensor], scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """Subtracts the first product from the original weight."""
        return without_product(weight, recipe, scaling)


def check_niter(init: str, value: Any) -> None:
    """Raises a ConfigError for what is neither None nor a count of iterations."""
    if value is not None and (not is_whole(value) or value < 0):
        raise ConfigError(
            f"init_options: niter of {init} is a count of iterations, or None for what is exact, not {value!r}."
        )


def fill_rest(context: InitContext, kept: int) -> None:
    """Starts the ranks from `kept` on as `kaiming` does: those that the decomposed matrix does not have.

    Left at zero in both factors, they would never get a gradient.
    """
    if kept < context.A.shape[0]:
        nn.init.kaiming_uniform_(context.A[kept:], a=math.sqrt(5), generator=context.generator)
        context.B[:, kept:] = 0


def recipe_of(context: InitContext) -> dict[str, Tensor]:
    """Returns copies of the first factors, from which `without_product` computes the changed base again."""
    return {"A": context.A.clone(), "B": context.B.clone()}


def without_product(weight: Tensor, recipe: Mapping[str, Tensor], scaling: float) -> Tensor:
    """Returns `weight - scaling * B @ A`, with the same bits on every machine.

    Each rank is subtracted by itself in float64, in order: a matrix product may add in any order, which depends on the
    library, the processor and the number of threads.

    Args:
        weight: `(out, in)`.
        recipe: A `(r, in)` and B `(out, r)`.
        scaling: The factor of the product.
    """
    rest = in_float64(weight)
    for row, column in zip(in_float64(recipe["A"]), (scaling * in_float64(recipe["B"])).T, strict=True):
        rest = rest - column[:, None] * row
    return rest.to(weight.dtype)
