"""Dropout masks that are drawn again from a seed instead of being stored.

Drawing is most of the cost of dropout on a CPU, so one draw of 64 bits serves eight elements: each takes a byte, and is
dropped if the byte is below `256 p`, rounded. The share that is dropped is therefore a multiple of 1/256; where that is
more than two per cent off (a small p), each element takes two bytes and the share is a multiple of 1/65536. Outputs are
scaled by the share that is really kept, so their mean is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 0.02
_FULL_RANGE = -(2**63)


@dataclass(frozen=True)
class Dropout:
    """One draw of masks, the same each time it is played.

    Args:
        seed: Where the masks come from.
        threshold: An element is dropped if its random number is below this one.
        bits: Of the random number of an element, 8 or 16.
    """

    seed: int
    threshold: int
    bits: int

    @classmethod
    def draw(cls, p: float) -> "Dropout":
        """Takes a seed from torch's global generator, whose state gradient checkpointing and resuming restore.

        Args:
            p: Probability of dropping an element.
        """
        bits = 8 if abs(round(256 * p) / 256 - p) <= _ROUNDING * p else 16
        threshold = max(1, min(round(2**bits * p), 2**bits - 1))
        return cls(int(torch.randint(2**62, ())), threshold, bits)

    @property
    def scale(self) -> float:
        """What the kept elements are multiplied by, so that the mean stays."""
        kept = 1 - self.threshold / float(2**self.bits)
        return 1 / kept

    def masks(self, device: torch.device) -> "MaskStream":
        """Returns the masks from their beginning."""
        return MaskStream(self, torch.Generator(device).manual_seed(self.seed))

    def mask_like(self, x: Tensor) -> Tensor:
        """Returns the mask of a whole tensor, 0 or 1, in its type and memory format."""
        mask = torch.empty_like(x, requires_grad=False)
        self.masks(x.device).fill(mask.as_strided((mask.numel(),), (1,)))
        return mask


@dataclass(frozen=True)
class MaskStream:
    """Masks in the order of drawing.

    Args:
        dropout: What is drawn.
        generator: Where the numbers come from.
    """

    dropout: Dropout
    generator: torch.Generator

    def fill(self, mask: Tensor) -> None:
        """Writes the next elements.

        Args:
            mask: Contiguous. Unless these are the last elements, their number is a multiple of 8.
        """
        bits = self.dropout.bits
        draws = torch.empty(-(-mask.numel() * bits // 64), dtype=torch.int64, device=mask.device)
        draws.random_(_FULL_RANGE, None, generator=self.generator)
        if bits == 8:
            numbers, threshold = draws.view(torch.uint8), self.dropout.threshold
        else:
            numbers, threshold = draws.view(torch.int16), self.dropout.threshold - 2**15
        torch.ge(numbers[: mask.numel()], threshold, out=mask.view(-1))
