"""EVA: A spans the directions in which the layer's inputs vary most.

Of the covariance of a layer's inputs x, C = E[(x - E x)(x - E x)ᵀ], the rows of A are the r leading eigenvectors, and
B = 0. The share of variance that an eigenvector explains is its eigenvalue over the trace of C. With `rho` above 1,
each layer offers its round(rho·r) leading directions, and those that explain most, over all layers, share the sum of
the ranks.
Source: Paischer et al., EVA, arXiv 2410.07170, algorithm 1. The paper updates the eigenvectors batch by batch; here the
covariance is summed over all batches, which is exact and does not depend on their order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import check_flag, number_from
from lora_plugins.inits.factors import check_niter, fill_rest
from lora_plugins.plugins import InitContext, InitPlugin, InputMoments, RankRequest


class EvaInit(InitPlugin):
    """Options: `rho` (how far ranks may move; 1 leaves them), `whiten` and `niter`.

    `whiten` divides each direction by the root of its singular value. `niter` are the subspace iterations of the
    decomposition; None is exact.
    """

    name = "eva"
    options: ClassVar[Mapping[str, Any]] = {"rho": 1.0, "whiten": False, "niter": 4}
    needs = "inputs"

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses a `rho` below 1, and what is no flag or no count."""
        check_niter(self.name, options["niter"])
        number_from(1)("init_options: rho of eva", options["rho"])
        check_flag("init_options: whiten of eva", options["whiten"])

    def allocate(self, requests: Sequence[RankRequest], options: Mapping[str, Any]) -> Mapping[str, int]:
        """Gives the ranks to the directions that explain most, over all layers."""
        if options["rho"] == 1:
            return {}
        # The same on every process of a run, whatever its seed: they have to agree on the shapes.
        generator = torch.Generator().manual_seed(0)
        offers = [
            (-share, place, request.layer)
            for place, request in enumerate(requests)
            for share in _shares(request, round(options["rho"] * request.r), options["niter"], generator)
        ]
        if not offers:
            raise ConfigError("init_data: the inputs of all layers are constant, and eva starts from how they vary.")
        budget = sum(request.r for request in requests)
        given = Counter(layer for _, _, layer in sorted(offers)[:budget])
        return {request.layer: given[request.layer] for request in requests}

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills A with eigenvectors of the inputs' covariance, and B with zeros."""
        inputs = context.calibration.inputs
        assert inputs is not None
        directions, values = principal(inputs, context.A.shape[0], context.options["niter"], context.generator)
        if context.options["whiten"]:
            directions = directions / values.sqrt().sqrt()[:, None]
        context.A[: len(directions)] = directions.to(context.A.dtype)
        context.B.zero_()
        fill_rest(context, len(directions))
        return {}


def principal(inputs: InputMoments, count: int, niter: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the leading directions of inputs `(k, in)` and the squared singular values along them `(k,)`, float64.

    Directions in which nothing varies are left out. The largest entry of each is positive.

    Args:
        inputs: The moments of the inputs.
        count: How many directions, at most.
        niter: None for the exact decomposition; else the subspace iterations of a faster one.
        generator: What the faster one draws from.
    """
    scatter = inputs.scatter()
    # More than are used, so that the faster decomposition has those right.
    values, columns = torch.linalg.eigh(scatter) if niter is None else _leading(scatter, 2 * count, niter, generator)
    values, rows = values.flip(0)[:count], columns.T.flip(0)[:count]
    kept = int((values > 1e-12 * values.amax()).sum())
    rows = rows[:kept]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign(), values[:kept]


def _leading(scatter: Tensor, count: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the largest eigenvalues, ascending, and their eigenvectors as columns, by subspace iteration.

    It is `torch.svd_lowrank`, which multiplies by the matrix twice in each iteration, for symmetric matrices alone:
    without the products with the transposed matrix, which take twenty times as long on a CPU (measured at 4608 columns
    in float64).
    """
    start = torch.randn(len(scatter), min(count, len(scatter)), dtype=scatter.dtype, device="cpu", generator=generator)
    basis = torch.linalg.qr(scatter @ start).Q
    for _ in range(2 * niter):
        basis = torch.linalg.qr(scatter @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ (scatter @ basis))
    return values, basis @ vectors


def _shares(request: RankRequest, count: int, niter: int | None, generator: torch.Generator) -> list[float]:
    """Returns the shares of variance that the leading directions of a layer explain, averaged over its slots."""
    shares = torch.zeros(count, dtype=torch.float64, device="cpu")
    for calibration in request.slots:
        inputs = calibration.inputs
        assert inputs is not None
        _, values = principal(inputs, count, niter, generator)
        spread = inputs.gram.trace() - inputs.total.square().sum() / inputs.count
        shares[: len(values)] += values / spread / len(request.slots)
    return [share for share in shares.tolist() if share > 0]
