"""What the tests of kernels by oneDNN share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """The shapes that oneDNN's function is called with."""
    shapes = []
    original = torch.ops.mkldnn._linear_pointwise.default

    class Spy:
        @staticmethod
        def default(x: Tensor, *others: object) -> Tensor:
            shapes.append(x.shape)
            return original(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Spy)
    return shapes
