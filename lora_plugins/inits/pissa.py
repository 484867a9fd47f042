"""PiSSA: the principal singular values of the weight are trained, and the rest is frozen.

W = U·S·Vᵀ. With s the adapter's scaling: B = U[:, :r]·√(S[:r]/s), A = √(S[:r]/s)·Vᵀ[:r], and the base becomes
W - s·B·A. With `niter`, the decomposition is a fast randomized one.
Source: Meng et al., PiSSA, arXiv 2404.02948, equations 2 to 4.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lora_plugins.inits.factors import TakenOut, check_niter, fill_rest, recipe_of
from lora_plugins.plugins import InitContext
from lora_plugins.utils import low_rank


class PissaInit(TakenOut):
    """Option: `niter`, subspace iterations of the fast decomposition (PEFT's `pissa_niter_16` is 16); None is exact."""

    name = "pissa"
    options: ClassVar[Mapping[str, Any]] = {"niter": None}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses what is no count of iterations."""
        check_niter(self.name, options["niter"])

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A and B from the singular value decomposition of the weight."""
        rank, (rows, columns) = context.A.shape[0], context.weight.shape
        A, B = low_rank(context.weight, rank, context.scaling, context.options["niter"], context.generator)
        context.A.copy_(A)
        context.B.copy_(B)
        fill_rest(context, min(rank, rows, columns))
        return recipe_of(context)
