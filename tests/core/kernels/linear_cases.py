"""Linear layers with an update: shapes that take each path, unusual inputs, and the law."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import lora_linear
from tests.core.kernels.update import LowRank

MANY, FEW = (3, 16), (1, 2)  # rows: the update is added to the weight, or to the output
SHAPES = {
    "effective_weight_first": (MANY, 5, 1),
    "effective_weight_first_wide": (MANY, 9, 1),
    "effective_weight_first_and_high_rank": (MANY, 9, 4),  # the gradient of the whole weight is cheaper
    "small_products": (FEW, 5, 2),
    "small_products_wide": (FEW, 9, 2),
}

shapes = pytest.mark.parametrize(("lead", "outputs", "r"), SHAPES.values(), ids=SHAPES)
drops = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])


def tensors(lead: tuple[int, ...], outputs: int, r: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(*lead, 6), (outputs, 6), (outputs,), (r, 6), (outputs, r)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *update: Tensor | float, axis: int = -1) -> Tensor:
    """Calls `lora_linear` with an update of A, B, scaling, dropout and, if given, low_memory."""
    return lora_linear(x, weight, bias, LowRank(*update), axis=axis)


def seeded(dropout: float):
    def compute(*inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return linear(*inputs, 1.7, dropout)

    return compute


def law(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, weight + 1.7 * B @ A, bias)


UNUSUAL = {
    "one_row": lambda: torch.randn(6),
    "no_row": lambda: torch.randn(0, 6),
    "transposed": lambda: torch.randn(6, 30).T,
    "permuted": lambda: torch.randn(4, 6, 7).transpose(1, 2),
}
