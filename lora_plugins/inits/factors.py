"""What several inits do with factors: low-rank approximation, ranks that a matrix does not have, the changed base."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_plugins.plugins.init import InitContext
from lora_plugins.utils.randomness import seeded


def truncated_svd(
    matrix: Tensor, rank: int, niter: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading singular vectors and values of a matrix: U `(out, k)`, S `(k,)` and Vh `(k, in)`.

    Args:
        matrix: `(out, in)`.
        rank: How many; k is smaller where the matrix does not have so many.
        niter: None for the exact decomposition; else the subspace iterations of a randomized one, which is faster
            (Halko et al., arXiv 0909.4061, algorithm 5.1).
        generator: What the randomized one draws from.
    """
    kept = min(rank, *matrix.shape)
    if niter is None:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :kept], S[:kept], Vh[:kept]
    assert generator is not None
    with seeded(generator):
        U, S, V = torch.svd_lowrank(matrix, q=kept, niter=niter)
    return U, S, V.T


def low_rank(
    matrix: Tensor, rank: int, scaling: float, niter: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Returns A `(rank, in)` and B `(out, rank)` so that `scaling * B @ A` is the best approximation of a matrix.

    The truncated singular value decomposition (Eckart and Young, 1936), its singular values shared evenly by both
    factors; ranks beyond those of the matrix are zero.

    Args:
        matrix: `(out, in)`.
        rank: The rank of the factors.
        scaling: The factor that the update will be multiplied by.
        niter: As in `truncated_svd`.
        generator: As in `truncated_svd`.
    """
    U, S, Vh = truncated_svd(matrix, rank, niter, generator)
    root = (S / scaling).sqrt()
    A = matrix.new_zeros(rank, matrix.shape[1])
    B = matrix.new_zeros(matrix.shape[0], rank)
    A[: len(S)] = root[:, None] * Vh
    B[:, : len(S)] = U * root
    return A, B


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
    rest = weight.double()
    for row, column in zip(recipe["A"].double(), (scaling * recipe["B"].double()).T, strict=True):
        rest = rest - column[:, None] * row
    return rest.to(weight.dtype)
