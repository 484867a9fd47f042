"""The settings that `train` takes where no flag says another one; docs/settings.md has the runs that they rest on."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_plugins.tasks.autoconfig.found import LABELS, MASKS

SCHEDULE = "lora_plugins.tasks.warmup_cosine"


@dataclass(frozen=True)
class Recommended:
    """Settings of a task.

    Attributes:
        adapted: What is adapted and trained, in words.
        lora: Fields of the `LoraConfig`, the rank among them. `alpha` stays 8 at every rank.
        lr: Learning rate of the adapters.
        heads_lr_ratio: Learning rate of the new head and of biases, as a multiple of that of the adapters.
        epochs: Rounds through the images.
        largest_batch: Images in a batch, where there are enough for that.
    """

    adapted: str
    lora: Mapping[str, Any]
    lr: float
    heads_lr_ratio: float
    epochs: int
    largest_batch: int


RECOMMENDED: Mapping[str, Recommended] = MappingProxyType(
    {
        LABELS: Recommended("attention or dense layers", {"r": 8}, 1e-3, 3.0, 10, 32),
        MASKS: Recommended(
            "every layer and all biases",
            {"r": 8, "target_modules": "all", "bias": "all", "norm": "track"},
            1e-3,
            3.0,
            20,
            8,
        ),
    }
)
"""By task. With masks, what a layer sees lies in its kernels, and statistics of normalization follow the pictures."""
