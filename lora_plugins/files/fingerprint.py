"""A fingerprint of a base weight: enough to notice that an adapter is put on another model."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-2
"""Distance, relative to the norm, up to which two weights count as the same: rounding to bfloat16 is below it."""

KEYS = ("norm", "dot0", "dot1", "dot2", "dot3")
"""What a fingerprint holds."""

_PERIOD = 4093


def fingerprint(weight: Tensor) -> dict[str, float]:
    """Returns the norm of a weight, and its dot products with four fixed vectors of random signs.

    Two independent weights differ in each product by about 1.4 times their norm, so one of them agrees within the
    tolerance by chance in 1 of 180 cases, and all four in 1 of 10⁹.

    Args:
        weight: Any shape.
    """
    flat = weight.detach().flatten()
    # The signs repeat, so the rows of this view can be added up first.
    sums = F.pad(flat, (0, -flat.numel() % _PERIOD)).view(-1, _PERIOD).sum(0, dtype=torch.float64)
    dots = (_signs() * sums.cpu()).sum(1).tolist()
    return dict(zip(KEYS, (float(torch.linalg.vector_norm(flat, dtype=torch.float64)), *dots), strict=True))


@functools.cache
def _signs() -> Tensor:
    return torch.randint(0, 2, (len(KEYS) - 1, _PERIOD), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def same(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether two fingerprints can be those of one weight, up to rounding to half precision."""
    scale = TOLERANCE * max(first["norm"], second["norm"])
    return all(abs(first[key] - second[key]) <= scale for key in KEYS)
