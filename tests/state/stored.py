"""What it means that a weight is stored in fewer bytes, written down without lora_plugins."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, GROUP = 64, 256
"""Values that share a scale, and scales that share a maximum."""

# Quantiles of the normal distribution (Dettmers et al., arXiv 2305.14314, section 3), to float32.
_NF4 = (
    -1.0, -0.6961929202079773, -0.5250730514526367, -0.39491748809814453, -0.28444135189056396, -0.18477343022823334,
    -0.09104999154806137, 0.0, 0.07958032935857773, 0.16093017160892487, 0.24611228704452515, 0.33791518211364746,
    0.44070979952812195, 0.5626169443130493, 0.7229567170143127, 1.0,
)  # fmt: skip

HALF_A_STEP = {"nf4": (1 - 0.6961928009986877) / 2, "int8": 0.5 / 127}
"""By how much a value is off at most, as a share of its scale."""


@dataclass(frozen=True)
class Stored:
    """A stored weight.

    Args:
        storage: Its name.
        tensors: What is stored.
        source: The float weight that gives the same bits, from which files load.
        exact: Whether it really does; the merged value, from which a merge for good made others, is not kept.
        residual: Whether it does together with the init of one adapter, which took its own part off before.
    """

    storage: str
    tensors: dict[str, Tensor]
    source: Tensor
    exact: bool = True
    residual: bool = False

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dense value, by default in the type of the float weight; float32 decides about its bits."""
        scales = _scales(self.tensors, torch.float32)[:, None]
        scales = scales / 127 if self.storage == "int8" else scales
        values = _unpacked(self.storage, self.tensors["codes"]).view(-1, BLOCK) * scales
        return values.flatten()[: self.source.numel()].view(self.source.shape).to(dtype or self.source.dtype)

    def same_bits(self, other: "Stored") -> bool:
        """Whether the same is stored."""
        return self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(tensor, other.tensors[key]) for key, tensor in self.tensors.items()
        )


def not_nearest(storage: str, tensors: Mapping[str, Tensor], wanted: Tensor, dtype: torch.dtype) -> str:
    """Says why what is stored is not as near to a weight as the storage can be; empty if it is.

    Args:
        storage: Its name.
        tensors: What is stored.
        wanted: The weight.
        dtype: Type of the model, which a merged weight is rounded to before it is stored.
    """
    flat = wanted.double().flatten()
    blocks = torch.cat([flat, flat.new_zeros(-flat.numel() % BLOCK)]).view(-1, BLOCK)
    largest, scales = blocks.abs().amax(1), _scales(tensors, torch.float64)
    maxima = tensors["scale_maxima"].double().repeat_interleave(GROUP)[: len(scales)]
    rounding = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    slack = 1e-6 + rounding * float(largest.max())
    step = maxima * (torch.sqrt(largest / maxima.clamp(min=1e-30)) / 255 + 1 / 255**2)
    if not bool(((scales - largest).abs() <= step + slack).all()):  # so that NaN is not near
        return f"the scales are {scales}, the largest magnitudes {largest}"
    steps = _unpacked(storage, tensors["codes"]).view(-1, BLOCK).double()
    values = (steps / 127 if storage == "int8" else steps) * scales[:, None]
    allowed = HALF_A_STEP[storage] * scales + (scales - largest).abs() + slack
    off = (values - blocks).abs() - allowed[:, None]
    return "" if bool((off <= 0).all()) else f"a value is off by {float(off.max()):.3g} more than half a step"


def _scales(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    shares = tensors["scale_codes"].to(dtype) / 255
    return shares * shares * tensors["scale_maxima"].to(dtype).repeat_interleave(GROUP)[: len(shares)]


def _unpacked(storage: str, codes: Tensor) -> Tensor:
    if storage == "int8":
        return codes.float()
    pairs = torch.stack([codes // 16, codes % 16], 1).flatten()
    return torch.tensor(_NF4)[pairs.long()]
