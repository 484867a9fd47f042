"""Rows of pictures: one for each prompt, all with the same seeds."""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from lora_plugins.integrations.diffusers import Sampling, sample


def sample_rows(
    pipe: Any, prompts: Sequence[str], pictures: int, sampling: Sampling, first_seed: int = 0
) -> list[list[Image]]:
    """Returns that many pictures for each prompt; the first one has the first seed, each next one the next."""
    seeds = range(first_seed, first_seed + pictures)
    sampled = sample(pipe, [prompt for prompt in prompts for _ in seeds], [*seeds] * len(prompts), sampling)
    return [sampled[start : start + pictures] for start in range(0, len(sampled), pictures)]
