"""The embedded data set for classification: single handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from lora_plugins.tasks.data import Size, TensorSamples, VisionDataModule
from lora_plugins.tasks.examples.handwritten_digits import Digits, handwriting


class DigitsDataModule(VisionDataModule):
    """Single handwritten digits, as color images of three equal channels.

    Args:
        digits: Which digits there are; the class of `digits[i]` is `i`.
        image_size: Height and width; the 8x8 digits are enlarged to it.
        dark_on_light: Dark ink on light paper, rather than light ink on a dark ground.
        quarter_turns: By how many quarters of a turn each digit is rotated, counter-clockwise.
        batch_size: Samples a batch.
        num_workers: Processes that load data; the digits are in memory, so more than 0 seldom helps.
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
        self.digits, self.image_size = list(digits), image_size
        self.dark_on_light, self.quarter_turns = dark_on_light, quarter_turns

    @property
    def class_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in self.digits]

    def size(self) -> Size:
        """Height and width of the images."""
        return self.image_size, self.image_size

    def load(self) -> dict[str, Dataset[dict[str, object]]]:
        """Draw the digits of the three splits."""
        return {split: self._draw(samples) for split, samples in handwriting(self.digits).items()}

    def _draw(self, samples: Digits) -> TensorSamples:
        size = (self.image_size, self.image_size)
        ink = interpolate(samples.ink[:, None], size=size, mode="bilinear", align_corners=False)
        ink = torch.rot90(ink, self.quarter_turns, (2, 3))
        light = 1 - ink if self.dark_on_light else ink
        images = (light * 255).round().byte().expand(-1, 3, -1, -1)
        return TensorSamples(images, samples.labels, [f"digit number {n}" for n in samples.numbers.tolist()])
