"""Low-rank approximation of a matrix."""

import torch
from torch import Tensor

from lora_plugins.utils.randomness import seeded


def truncated_svd(
    matrix: Tensor, rank: int, niter: int | None, generator: torch.Generator | None
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
