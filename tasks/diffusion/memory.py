"""A cache of what is computed once: latents of pictures and encodings of prompts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Memory:
    """Rows of tensors by name.

    A row that is missing is computed by itself: in a batch its last bits would depend on what else is missing, and so
    on whether a run was interrupted.

    Args:
        compute: Takes the name of a row and its number among those that are asked for, and returns tensors of one row.
    """

    def __init__(self, compute: Callable[[str, int], Tensors]) -> None:
        self.compute = compute
        self.rows: dict[str, Tensors] = {}

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The rows of some names, stacked."""
        for number, name in enumerate(names):
            if name not in self.rows:
                self.rows[name] = self.compute(name, number)
        rows = [self.rows[name] for name in names]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
