"""The types that a step computes in."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The types that a step computes in.

    Args:
        weights: Of the base and the batch.
        autocast: What autocast computes in; None without it.
    """

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Returns what a step runs in."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Returns what scales the loss, which float16 needs."""
        return torch.amp.GradScaler(device.type, enabled=self.autocast == torch.float16)


PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision(),
    "bf16 autocast": Precision(autocast=torch.bfloat16),
    "bf16 weights": Precision(weights=torch.bfloat16),
    "fp16 autocast": Precision(autocast=torch.float16),
}
