"""Products of matrices with few columns or rows, from which A and B get their gradients."""

import torch
from torch import Tensor

_WIDE, _BLOCKS = 256, 8


def contract(few: Tensor, many: Tensor) -> Tensor:
    """Returns `fewᵀ many`: `(r, width)` from `(rows, r)` and `(rows, width)`.

    On a CPU, a product that reduces many rows to so few leaves threads idle; blocks of columns, one a thread, do not.
    """
    rows, width = many.shape
    idle = many.device.type == "cpu" and torch.get_num_threads() > 1
    if not idle or width < _WIDE or width % _BLOCKS:
        return few.T @ many
    blocks = many.view(rows, _BLOCKS, -1).transpose(0, 1)
    return torch.bmm(few.T.expand(_BLOCKS, -1, -1), blocks).transpose(0, 1).reshape(-1, width)


def project(gradient: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of A and B from that of the matrix to which `scale · B A` is added."""
    gradient = gradient.to(A.dtype)
    # beta=0 leaves the first argument out: a product and its factor in one operation.
    return torch.addmm(A, B.T, gradient, beta=0, alpha=scale), torch.addmm(B, gradient, A.T, beta=0, alpha=scale)
