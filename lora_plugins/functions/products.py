"""Products of tall matrices with few columns."""

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
