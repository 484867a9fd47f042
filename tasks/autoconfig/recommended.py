"""The settings that `train` takes where no flag says another one, by the name of `--recipe`.

docs/settings.md has the runs that those of `auto` rest on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_plugins.tasks.autoconfig.found import LABELS, MASKS

AUTO, PLAIN = "auto", "plain"


@dataclass(frozen=True)
class Recipe:
    """Settings of a task.

    Attributes:
        adapted: What is adapted and trained, in words.
        lora: Fields of the `LoraConfig`, the rank among them. `alpha` stays 8 at every rank.
        lr: Learning rate of the adapters.
        heads_lr_ratio: Learning rate of the new head and of biases, as a multiple of that of the adapters.
        scheduler: Class path of the schedule; none for a constant rate.
        schedule: The schedule in words.
        epochs: Rounds through the images.
        largest_batch: Images in a batch, where there are enough for that.
    """

    adapted: str
    lora: Mapping[str, Any]
    lr: float
    heads_lr_ratio: float
    scheduler: str | None
    schedule: str
    epochs: int
    largest_batch: int


DEFAULT_LAYERS = "attention or dense layers"
WARMUP_COSINE, IN_WORDS = "lora_plugins.tasks.warmup_cosine", "with warm-up and cosine"

RECIPES: Mapping[str, Mapping[str, Recipe]] = MappingProxyType(
    {
        AUTO: {
            LABELS: Recipe(DEFAULT_LAYERS, {"r": 8}, 1e-3, 3.0, WARMUP_COSINE, IN_WORDS, 10, 32),
            # What a layer sees lies in its kernels, and statistics of normalization follow the pictures.
            MASKS: Recipe(
                "every layer and all biases",
                {"r": 8, "target_modules": "all", "bias": "all", "norm": "track"},
                1e-3,
                3.0,
                WARMUP_COSINE,
                IN_WORDS,
                20,
                8,
            ),
        },
        # What `LoraConfig` and the tasks do by themselves.
        PLAIN: {
            LABELS: Recipe(DEFAULT_LAYERS, {"r": 8}, 1e-3, 1.0, None, "constant", 10, 32),
            MASKS: Recipe(DEFAULT_LAYERS, {"r": 8}, 1e-3, 1.0, None, "constant", 20, 8),
        },
    }
)
"""By the name of the recipe and the task. Epochs and batches are no settings of LoRA, and alike in all."""
