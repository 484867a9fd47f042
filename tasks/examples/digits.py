"""The embedded data set for classification: single handwritten digits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from lora_plugins.field_checks import Check, check_count, check_fields, check_flag, check_whole
from lora_plugins.tasks.argument_checks import check_digits
from lora_plugins.tasks.data import Size, TensorSamples, VisionDataModule
from lora_plugins.tasks.examples.handwritten_digits import DigitSamples, load_digit_splits

_CHECKS: Mapping[str, Check] = {
    "digits": check_digits,
    "image_size": check_count,
    "dark_on_light": check_flag,
    "quarter_turns": check_whole,
}
"""What the arguments can be, by name; the others are checked by whoever takes them."""


class DigitsDataModule(VisionDataModule):
    """Single handwritten digits, as color images of three equal channels.

    Args:
        digits: The digits; the class of `digits[i]` is `i`.
        image_size: Height and width to which the 8x8 digits are resized.
        dark_on_light: Dark ink on light paper, instead of light ink on a dark background.
        quarter_turns: The rotation of each digit in quarter turns, counterclockwise.
        batch_size: Samples per batch.
        num_workers: Worker processes that load data; the digits are in memory, so more than 0 rarely helps.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        digits: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        *,
        image_size: int = 16,
        dark_on_light: bool = False,
        quarter_turns: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        given = {"digits": digits, "image_size": image_size}
        check_fields({**given, "dark_on_light": dark_on_light, "quarter_turns": quarter_turns}, _CHECKS)
        self.digits, self.image_size = list(digits), image_size
        self.dark_on_light, self.quarter_turns = dark_on_light, quarter_turns

    @property
    def class_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in self.digits]

    def size(self) -> Size:
        """Height and width of the images."""
        return self.image_size, self.image_size

    def load(self) -> dict[str, Dataset[dict[str, Any]]]:
        """Draws the digits of the three splits."""
        return {split: self._draw_split(samples) for split, samples in load_digit_splits(self.digits).items()}

    def _draw_split(self, samples: DigitSamples) -> TensorSamples:
        size = (self.image_size, self.image_size)
        ink = interpolate(samples.ink[:, None], size=size, mode="bilinear", align_corners=False)
        ink = torch.rot90(ink, self.quarter_turns, (2, 3))
        light = 1 - ink if self.dark_on_light else ink
        images = (light * 255).round().byte().expand(-1, 3, -1, -1)
        return TensorSamples(images, samples.labels, [f"digit number {n}" for n in samples.numbers.tolist()])
