"""Samples pictures from a pipeline, the same ones for the same seeds."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from lora_plugins import ConfigError
from lora_plugins.errors import counted
from lora_plugins.field_checks import check_count, finite, optional
from lora_plugins.inplace import held_in_eval_mode

_PLAIN: Mapping[str, bool] = {"use_resolution_binning": False, "clean_caption": False}
"""Arguments that PixArt's pipelines take: the size that was asked for, and the prompt as it was written."""

_NEGATES = "true_cfg_scale"
"""An argument of pipelines, such as Flux's, without which they pass over a negative prompt."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled.

    Args:
        steps: The number of steps of the scheduler.
        guidance: The scale of classifier-free guidance; at most 1 for none.
        height: Of the pictures; by default what the pipeline was made for.
        width: Likewise; both or neither.
        negative_prompt: What the guidance leads away from.
        batch_size: How many pictures are sampled at once. It can change their last bits.

    Raises:
        ConfigError: For a number that is none, a height without a width, or a negative prompt without guidance.
    """

    steps: int = 30
    guidance: float = 5.0
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size)
        finite("guidance", self.guidance)
        optional(check_count)("height", self.height)
        optional(check_count)("width", self.width)
        if (self.height is None) != (self.width is None):  # pipelines of Stable Diffusion would ignore the one
            raise ConfigError(f"height is {self.height} and width is {self.width}: give both, or neither.")
        if self.negative_prompt and self.guidance <= 1:
            raise ConfigError(
                f"negative_prompt is what guidance leads away from, and guidance is {self.guidance:g}, which is none. "
                "Set it above 1, or leave the negative prompt out."
            )

    def arguments(self, pipe: Any, count: int) -> dict[str, Any]:
        """Returns the arguments of a pipeline's call for a number of pictures.

        Raises:
            ConfigError: If there is a negative prompt that the pipeline would not read.
        """
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "negative_prompt": [self.negative_prompt] * count if self.negative_prompt else None,
        }
        taken = inspect.signature(type(pipe).__call__).parameters
        if self.negative_prompt and _NEGATES in taken:
            raise ConfigError(
                f"A {type(pipe).__name__} does not lead away from a negative prompt: its guidance is part of what the "
                "model was trained on. Leave negative_prompt out."
            )
        plain = {name: value for name, value in _PLAIN.items() if name in taken}
        return {**plain, **{name: value for name, value in given.items() if value is not None}}


def sample(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> list[Image]:
    """Returns a picture for each prompt and its seed.

    The noise of a picture depends on its seed alone: not on the others, the device or the state of torch's random
    numbers, which is left as it is.

    Args:
        pipe: The pipeline; it samples in eval mode, and its modes are restored.
        prompts: The prompts.
        seeds: A seed for each.
        sampling: How.

    Raises:
        ConfigError: If a prompt is empty, there is not one seed for each, torch cannot take a seed, or the pipeline
            refuses what it is to draw, such as a height, or would not read the negative prompt.
    """
    sampling = sampling or Sampling()
    if len(prompts) != len(seeds):
        raise ConfigError(
            f"{counted(len(prompts), 'prompt')} and {counted(len(seeds), 'seed')}: give one seed for each prompt."
        )
    if any(not prompt.strip() for prompt in prompts):
        raise ConfigError("A prompt is empty. Say what is to be seen.")
    if wrong := [seed for seed in seeds if not -(2**63) <= seed < 2**64]:
        raise ConfigError(f"A seed is {wrong[0]}; torch takes those from -2**63 to 2**64 - 1.")
    pictures: list[Image] = []
    with torch.no_grad(), in_eval_mode(pipe):
        for start in range(0, len(prompts), sampling.batch_size):
            chosen = slice(start, start + sampling.batch_size)
            generators = [torch.Generator().manual_seed(index(seed)) for seed in seeds[chosen]]
            arguments = sampling.arguments(pipe, len(generators))
            try:
                pictures += pipe(list(prompts[chosen]), generator=generators, **arguments).images
            except ValueError as error:
                raise ConfigError(f"The {type(pipe).__name__} refuses to draw this: {error}") from error
    return pictures


def in_eval_mode(pipe: Any) -> AbstractContextManager[None]:
    """Puts all parts of a pipeline into eval mode inside a `with` block."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return held_in_eval_mode(module for part in parts for module in part.modules())
