"""Weights stored in blocks: a code for each value, and a scale for each block.

With `double_quant` the scales are stored in 8 bits themselves (as in Dettmers et al., arXiv 2305.14314, section 3, for
which the codes are chosen by the scales as they are stored). They are square roots of shares of the largest of
`SCALE_GROUP` of them, and so need no sum, whose bits would depend on the device.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import check_flag, is_whole
from lora_plugins.plugins import StoragePlugin
from lora_plugins.utils import blocks_of, nearest_levels

AT_ONCE = 2**18
"""How many values are stored at a time: what is computed on the way takes several times their memory."""

SCALE_GROUP = 256
"""How many scales share one float32 number where they are stored in 8 bits."""


LARGEST_BLOCK = 4096
"""The last block of a weight is filled up with zeros, so large ones would take more than they save."""


class BlockwiseStorage(StoragePlugin):
    """Options: `block_size`, values that share a scale, an even number; and `double_quant`, for scales in 8 bits."""

    options: ClassVar[Mapping[str, Any]] = {"block_size": 64, "double_quant": True}
    table: ClassVar[Tensor]
    """The levels in ascending order, float32."""
    unit: ClassVar[float] = 1.0
    """What the level 1 is in `unpacked`: scales are divided by it, as there are fewer of them than of values."""

    @abstractmethod
    def packed(self, codes: Tensor) -> Tensor:
        """Returns indices of levels, `(n,)` of int32 with n even, as they are stored."""

    @abstractmethod
    def unpacked(self, codes: Tensor) -> Tensor:
        """Returns the levels of stored codes times `unit`, `(n,)` of float32; a new tensor."""

    @abstractmethod
    def levels_at(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Returns the levels at some positions, any shape, of stored codes, times `unit`."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses blocks of an odd size or longer than most weights, and what is no flag."""
        size = options["block_size"]
        if not is_whole(size) or not 2 <= size <= LARGEST_BLOCK or size % 2:
            raise ConfigError(
                f"quantize_options: block_size of {self.name} is an even count up to {LARGEST_BLOCK}, not {size!r}."
            )
        check_flag(f"quantize_options: double_quant of {self.name}", options["double_quant"])

    def store(self, weight: Tensor, options: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Returns the codes and the scales."""
        blocks, table = blocks_of(weight, options["block_size"]), self.table.to(weight.device)
        at_once = AT_ONCE // options["block_size"]
        largest = torch.cat([part.abs().amax(1) for part in torch.split(blocks, at_once)])
        scales = _stored_scales(largest, options["double_quant"])
        parts = zip(torch.split(blocks, at_once), torch.split(_scales(scales), at_once), strict=True)
        codes = [self.packed(nearest_levels(part, own, table).flatten()) for part, own in parts]
        return {"codes": torch.cat(codes), **scales}

    def restore(self, tensors: Mapping[str, Tensor], shape: torch.Size, options: Mapping[str, Any]) -> Tensor:
        """Multiplies the levels of each block with its scale."""
        scales = _scales(tensors) / self.unit
        blocks = self.unpacked(tensors["codes"]).view(-1, options["block_size"]).mul_(scales[:, None])
        return blocks.flatten()[: shape.numel()].view(shape)

    def rows(
        self, tensors: Mapping[str, Tensor], index: Tensor, shape: torch.Size, options: Mapping[str, Any]
    ) -> Tensor:
        """Makes the values of these rows alone dense."""
        width = shape[1:].numel()
        positions = index.long()[..., None] * width + torch.arange(width, device=index.device)
        scales = (_scales(tensors) / self.unit)[positions // options["block_size"]]
        return (self.levels_at(tensors["codes"], positions) * scales).view(*index.shape, *shape[1:])


def _stored_scales(scales: Tensor, in_8_bits: bool) -> dict[str, Tensor]:
    if not in_8_bits:
        return {"scales": scales}
    groups = blocks_of(scales, SCALE_GROUP)
    largest = groups.amax(1)
    shares = (groups / largest[:, None]).sqrt() * 255
    # No scale becomes zero, which would lose its block; of a group of zeros, 0 / 0 is not taken.
    codes = torch.where(groups > 0, shares.round().clamp(min=1), 0)
    return {"scale_codes": codes.flatten()[: scales.numel()].to(torch.uint8), "scale_maxima": largest}


def _scales(stored: Mapping[str, Tensor]) -> Tensor:
    """Returns the scale of each block, float32."""
    if "scales" in stored:
        return stored["scales"]
    codes = stored["scale_codes"]
    shares = codes.float() / 255
    return shares * shares * stored["scale_maxima"].repeat_interleave(SCALE_GROUP)[: codes.numel()]
