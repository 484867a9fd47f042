"""Blockwise quantizers in plain torch: NormalFloat with 2 or 4 bits, and symmetric 8-bit integers.

NormalFloat (Dettmers et al., arXiv 2305.14314, section 3) places its levels at quantiles of the normal distribution,
with an exact zero and exact ends; each block is divided by its largest magnitude first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (2, 4, 8)
"""The widths there are."""

_OUTERMOST_QUANTILE = 0.9677083
"""Quantile of the outermost level: 1 - (1/32 + 1/30) / 4, so that both tails of 4 bits keep half a level."""


def levels(bits: int) -> Tensor:
    """Returns the levels from -1 to 1, float64, ascending: NormalFloat's of 2 or 4 bits, the 255 of 8-bit integers."""
    if bits == 8:
        return torch.arange(-127, 128, dtype=torch.float64, device="cpu") / 127
    count = 2**bits
    positive = torch.special.ndtri(_quantiles(count // 2 + 1))
    negative = -torch.special.ndtri(_quantiles(count // 2))
    table = torch.cat([negative, torch.zeros(1, dtype=torch.float64, device="cpu"), positive.flip(0)])
    # Rounded once, so that no platform's last bit of ndtri matters.
    return (table / table.abs().max()).float().to(torch.float64)


def blocks_of(values: Tensor, block_size: int) -> Tensor:
    """Returns flattened values as `(blocks, block_size)`, the last block filled up with zeros."""
    flat = values.flatten()
    missing = -flat.numel() % block_size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, block_size)


def nearest_levels(blocks: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Returns the index of the level that is nearest to each value, once divided by the scale of its block; int32.

    Args:
        blocks: `(blocks, block_size)`.
        scales: `(blocks,)`, none negative.
        table: The levels in ascending order, in the type of the values.
    """
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(blocks / torch.where(scales == 0, 1, scales)[:, None], middles, out_int32=True)


def quantize_dequantize(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """Returns the nearest values that a quantizer can represent.

    Args:
        weight: Any shape, a floating type; blocks run over its flattened values.
        bits: 2, 4 or 8.
        block_size: Values that share one scale.
    """
    blocks, table = blocks_of(weight, block_size), levels(bits).to(weight)
    scales = blocks.abs().amax(dim=1)
    values = table[nearest_levels(blocks, scales, table)] * scales[:, None]
    return values.flatten()[: weight.numel()].view(weight.shape)


def _quantiles(steps: int) -> Tensor:
    """Quantiles from the outermost down to, not including, the median."""
    return torch.linspace(_OUTERMOST_QUANTILE, 0.5, steps, dtype=torch.float64, device="cpu")[:-1]
