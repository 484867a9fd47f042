"""A fingerprint of a base weight: enough to notice that an adapter is put on another model."""

import torch
from torch import Tensor

TOLERANCE = 1e-2
"""Distance, relative to the norm, up to which two weights count as the same: rounding to bfloat16 is below it."""

_PERIOD = 4093


def fingerprint(weight: Tensor) -> dict[str, float]:
    """Returns the norm of a weight, and its dot product with fixed random signs.

    Two independent weights differ in the dot product by about 1.4 times their norm.

    Args:
        weight: Any shape.
    """
    values = weight.detach().flatten().double().cpu()
    signs = torch.randint(0, 2, (_PERIOD,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    repeated = signs.repeat(-(-values.numel() // _PERIOD))[: values.numel()]
    return {"dot": float(values @ repeated), "norm": float(torch.linalg.vector_norm(values))}


def same(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether two fingerprints can be those of one weight, up to rounding to half precision."""
    scale = TOLERANCE * max(first["norm"], second["norm"])
    return all(abs(first[key] - second[key]) <= scale for key in ("dot", "norm"))
