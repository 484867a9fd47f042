"""The settings that `train` takes unless a flag overrules them, by the name of `--recipe`.

docs/settings.md has the runs that those of `auto` rest on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_plugins.tasks.autoconfig.found import LABELS, MASKS

AUTO, PLAIN = "auto", "plain"


@dataclass(frozen=True)
class Recipe:
    """Settings of a task.

    Attributes:
        adapted: What is adapted and trained, in words.
        lora: Fields of the `LoraConfig`, the rank among them. `alpha` stays 8 at every rank.
        lr: Learning rate of every A.
        loraplus_lr_ratio: That of every B, as a multiple of it.
        heads_lr_ratio: That of the new head and of biases, likewise.
        clip: What the norm of all gradients is clipped to; None for no clipping.
        scheduler: Class path of the schedule; none for a constant rate.
        schedule: The schedule in words.
        epochs: Rounds through the images.
        largest_batch: Images in a batch, where there are enough for that.
    """

    adapted: str
    lora: Mapping[str, Any]
    lr: float
    loraplus_lr_ratio: float
    heads_lr_ratio: float
    clip: float | None
    scheduler: str | None
    schedule: str
    epochs: int
    largest_batch: int


DENSE_LAYERS = "dense layers"
WARMUP_COSINE, IN_WORDS = "lora_plugins.tasks.warmup_cosine", "with warm-up and cosine"

_TRIED = Recipe(
    adapted=DENSE_LAYERS,
    lora={"r": 8},
    lr=3e-3,
    loraplus_lr_ratio=3.0,
    heads_lr_ratio=1.0,
    clip=1.0,
    scheduler=WARMUP_COSINE,
    schedule=IN_WORDS,
    epochs=20,
    largest_batch=32,
)
_BY_ITSELF = replace(_TRIED, lr=1e-3, loraplus_lr_ratio=1.0, clip=None, scheduler=None, schedule="constant")
"""What `LoraConfig`, the tasks and the Trainer do by themselves."""

RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    AUTO: {
        LABELS: _TRIED,
        MASKS: replace(
            _TRIED,
            adapted="every layer and all biases",
            # What a layer sees lies in its kernels, and statistics of normalization follow the pictures.
            lora={"r": 8, "target_modules": "all", "bias": "all", "norm": "track"},
            heads_lr_ratio=3.0,
            largest_batch=8,
        ),
    },
    PLAIN: {LABELS: _BY_ITSELF, MASKS: replace(_BY_ITSELF, largest_batch=8)},
}
"""By the name of the recipe and the task. Epochs and batches are no settings of LoRA, and alike in all."""
