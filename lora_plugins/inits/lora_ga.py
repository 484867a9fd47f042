"""LoRA-GA: the first step of the adapter follows the gradient of full fine-tuning.

The gradient of the weight is G = U·S·Vᵀ. `direction` chooses r of its 2r leading singular vectors for A, and r for B;
`scale` chooses their size. With s the adapter's scaling, the base becomes W - s·B·A, so that the model starts as
it was. With c = ∜out/√gamma, the default is what PEFT computes: A = Vᵀ[:r], B = U[:, r:2r]·S[r:2r]·c. The paper's own
equation leaves S out and scales both, A = Vᵀ[:r]·c and B = U[:, r:2r]·c: that is `scale="paper"`.
Source: Wang et al., LoRA-GA, arXiv 2407.05000, algorithm 1.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_plugins.errors import TargetError
from lora_plugins.field_checks import check_factor, choice_of
from lora_plugins.inits.factors import TakenOut, check_niter, recipe_of
from lora_plugins.plugins import InitContext
from lora_plugins.utils import truncated_svd

Chosen = tuple[Tensor, Tensor]
"""Which singular vectors go to A, and which to B."""


def _halves(first: int, second: int) -> Callable[[int, torch.Generator], Chosen]:
    return lambda r, _: (torch.arange(r, device="cpu") + first * r, torch.arange(r, device="cpu") + second * r)


def _random(r: int, generator: torch.Generator) -> Chosen:
    chosen = torch.randperm(2 * r, device="cpu", generator=generator)[:r]
    return chosen, chosen


DIRECTIONS: Mapping[str, Callable[[int, torch.Generator], Chosen]] = {
    "ArB2r": _halves(0, 1),
    "A2rBr": _halves(1, 0),
    "ArBr": lambda r, _: (torch.arange(r, device="cpu") * 2 + 1, torch.arange(r, device="cpu") * 2),
    "random": _random,
}
"""The ways to choose singular vectors, by PEFT's names."""

SCALES = ("stable", "weight_svd", "gd_scale", "unit", "paper")
"""The sizes of A and B: PEFT's four, and the paper's."""


class LoraGaInit(TakenOut):
    """Options: `direction`, `scale`, `stable_gamma`, and `niter`, iterations of the decomposition (None is exact)."""

    name = "lora_ga"
    options: ClassVar[Mapping[str, Any]] = {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16, "niter": 4}
    needs = "gradients"

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses unknown directions and scales, and a gamma that is not positive."""
        check_niter(self.name, options["niter"])
        choice_of(*DIRECTIONS)("init_options: direction of lora_ga", options["direction"])
        choice_of(*SCALES)("init_options: scale of lora_ga", options["scale"])
        check_factor("init_options: stable_gamma of lora_ga", options["stable_gamma"])

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A and B with singular vectors of the gradient.

        Raises:
            TargetError: If the gradient has fewer than 2r singular vectors, naming the layer.
        """
        options, r = context.options, context.A.shape[0]
        gradient = context.calibration.gradient
        assert gradient is not None
        if 2 * r > min(gradient.shape):
            raise TargetError(
                f"{context.layer!r}: the init 'lora_ga' takes 2r = {2 * r} singular vectors, and the gradient of its "
                f"{list(gradient.shape)} matrix has {min(gradient.shape)}. Lower its rank by rank_pattern, or exclude "
                "it."
            )
        # More than the 2r that are used, so that the randomized decomposition has those right.
        U, S, Vh = truncated_svd(gradient.to(context.A.dtype), 4 * r, options["niter"], context.generator)
        for_A, for_B = DIRECTIONS[options["direction"]](r, context.generator)
        A, B, values = Vh[for_A], U[:, for_B], S[for_B]
        stable = context.B.shape[0] ** 0.25 / options["stable_gamma"] ** 0.5
        if options["scale"] == "paper":
            A, B = A * stable, B * stable
        else:
            B = B * values
        if options["scale"] == "stable":
            B = B * stable
        elif options["scale"] == "gd_scale":
            A, B = A / context.scaling, B / context.scaling
        elif options["scale"] == "weight_svd" and values[0] > 0:
            _, leading, _ = truncated_svd(context.weight, r, options["niter"], context.generator)
            B = B * (leading[0] / values[0])
        context.A.copy_(A)
        context.B.copy_(B)
        return recipe_of(context)
