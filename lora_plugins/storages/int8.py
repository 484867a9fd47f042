"""Symmetric integers of 8 bits, in blocks: -127 to 127 shares of the largest magnitude of the block."""

from typing import ClassVar

import torch
from torch import Tensor

from lora_plugins.storages.blockwise import BlockwiseStorage
from lora_plugins.utils import levels

_LEVELS = levels(8).float()


class Int8Storage(BlockwiseStorage):
    """8 bits for each value, and a scale for each block."""

    name = "int8"
    table: ClassVar[Tensor] = _LEVELS
    unit: ClassVar[float] = 127.0

    def packed(self, codes: Tensor) -> Tensor:
        """Returns the integers themselves."""
        return (codes - 127).to(torch.int8)

    def unpacked(self, codes: Tensor) -> Tensor:
        """Returns the integers of codes as numbers."""
        return codes.float()

    def levels_at(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Returns the integers of some of the codes as numbers."""
        return codes[positions].float()
