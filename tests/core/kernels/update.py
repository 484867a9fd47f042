"""The update of a layer, as kernels are told of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`scaling · B A`."""

    A: Tensor
    B: Tensor
    scaling: float = 1.7
    dropout: float = 0.0
    low_memory: bool = False
