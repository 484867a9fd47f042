"""NormalFloat in 4 bits (Dettmers et al., arXiv 2305.14314, section 3), two codes a byte, the first one in front.

The levels are those of bitsandbytes, up to its rounding, and the codes lie as there.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lora_plugins.storages.blockwise import BlockwiseStorage
from lora_plugins.utils import levels, on_device

_LEVELS = levels(4).float()

_BYTES = torch.stack([_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)], 1)
"""The two levels of each byte."""

_PAIRS = _BYTES.view(torch.int64).view(-1)
"""The same as one number, so that both are copied at once."""


class NF4Storage(BlockwiseStorage):
    """4 bits for each value, and a scale for each block."""

    name = "nf4"
    table: ClassVar[Tensor] = _LEVELS

    def packed(self, codes: Tensor) -> Tensor:
        """Puts two codes into a byte."""
        return (codes[::2] * 16 + codes[1::2]).to(torch.uint8)

    def unpacked(self, codes: Tensor) -> Tensor:
        """Looks up each byte."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined, no-untyped-call]
            # Graphs of TorchScript and ONNX cannot view a number as two.
            return on_device(_BYTES, codes.device).index_select(0, codes.int()).flatten()
        return on_device(_PAIRS, codes.device).index_select(0, codes.int()).view(torch.float32)

    def levels_at(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Takes the half of a byte that each position is in."""
        return on_device(_BYTES, codes.device)[codes[positions // 2].long(), positions % 2]
