"""The embedded data set for segmentation: scenes composed of handwritten digits, with the mask that goes with each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from lora_plugins import ConfigError
from lora_plugins.field_checks import Check, check_count, check_fields, check_flag, check_whole, whole_from
from lora_plugins.tasks.argument_checks import check_digits, check_sides
from lora_plugins.tasks.data import Size, TensorSamples, VisionDataModule
from lora_plugins.tasks.examples.handwritten_digits import DigitSamples, load_digit_splits
from lora_plugins.tasks.files import TEST, TRAIN, VAL

BACKGROUND = 0
INK_THRESHOLD = 0.35
NOISE = 0.06
ATTEMPTS = 20

_CHECKS: Mapping[str, Check] = {
    "digits": check_digits,
    "canvas": check_count,
    "digits_per_scene": whole_from(0),
    "digit_sizes": check_sides,
    "dark_on_light": check_flag,
    "quarter_turns": check_whole,
    **dict.fromkeys(("train_scenes", "val_scenes", "test_scenes"), whole_from(0)),
    "seed": check_whole,
}
"""What the arguments can be, by name; the others are checked by whoever takes them."""


class DigitScenesDataModule(VisionDataModule):
    """Scenes of several handwritten digits on an uneven, noisy background, with a mask of each digit's strokes.

    Class 0 is the background, named `ground`; the class of `digits[i]` is `i + 1`. Scenes of different splits have
    different samples of the digits. The same arguments make the same scenes, bit for bit.

    Args:
        digits: The digits.
        canvas: Height and width of a scene.
        digits_per_scene: The number of digits to place without overlap; one that finds no room is left out.
        digit_sizes: Smallest and largest side of a digit, in pixels.
        dark_on_light: Dark ink on light paper, instead of light ink on a dark background.
        quarter_turns: The rotation of each digit in quarter turns, counterclockwise.
        train_scenes: Number of scenes to train on.
        val_scenes: Number of scenes to validate on.
        test_scenes: Number of scenes to test on.
        seed: The seed of the scenes.
        batch_size: Scenes per batch.
        num_workers: Worker processes that load data; the scenes are in memory, so more than 0 rarely helps.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        digits: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
        *,
        canvas: int = 64,
        digits_per_scene: int = 4,
        digit_sizes: tuple[int, int] = (18, 26),
        dark_on_light: bool = False,
        quarter_turns: int = 0,
        train_scenes: int = 256,
        val_scenes: int = 64,
        test_scenes: int = 64,
        seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        given = {"digits": digits, "canvas": canvas, "digits_per_scene": digits_per_scene, "seed": seed}
        scenes = {"train_scenes": train_scenes, "val_scenes": val_scenes, "test_scenes": test_scenes}
        turned = {"dark_on_light": dark_on_light, "quarter_turns": quarter_turns}
        check_fields({**given, **scenes, **turned, "digit_sizes": digit_sizes}, _CHECKS)
        low, high = digit_sizes
        if not low <= high <= canvas:
            raise ConfigError(
                f"digit_sizes is {list(digit_sizes)}: smallest and largest side, at most canvas={canvas}."
            )
        self.digits, self.canvas, self.digit_sizes = list(digits), canvas, (low, high)
        self.digits_per_scene, self.seed = digits_per_scene, seed
        self.dark_on_light, self.quarter_turns = dark_on_light, quarter_turns
        self.scenes: Mapping[str, int] = {TRAIN: train_scenes, VAL: val_scenes, TEST: test_scenes}

    @property
    def class_names(self) -> list[str]:
        """`ground` and the digits."""
        return ["ground", *(str(digit) for digit in self.digits)]

    def size(self) -> Size:
        """Height and width of the scenes."""
        return self.canvas, self.canvas

    def load(self) -> dict[str, Dataset[dict[str, Any]]]:
        """Composes the scenes of the three splits."""
        splits = load_digit_splits(self.digits)
        return {
            split: self._compose_split(splits[split], split, count) for split, count in self.scenes.items() if count > 0
        }

    def _compose_split(self, samples: DigitSamples, split: str, count: int) -> TensorSamples:
        # A generator per split, so that the number of scenes in one split does not change another.
        generator = Generator().manual_seed(self.seed * len(self.scenes) + list(self.scenes).index(split))
        scenes = [self._compose(samples, generator) for _ in range(count)]
        images = torch.stack([image for image, _ in scenes])
        masks = torch.stack([mask for _, mask in scenes])
        return TensorSamples(images, masks, [f"{split} scene {i}" for i in range(count)])

    def _compose(self, samples: DigitSamples, generator: Generator) -> tuple[Tensor, Tensor]:
        """One scene: the image (3, canvas, canvas), 8-bit, and its mask (canvas, canvas)."""
        ink = torch.zeros(self.canvas, self.canvas)
        mask = torch.full((self.canvas, self.canvas), BACKGROUND)
        taken = torch.zeros(self.canvas, self.canvas, dtype=torch.bool)
        for _ in range(self.digits_per_scene):
            side = _randint(self.digit_sizes[0], self.digit_sizes[1], generator)
            place = self._free_place(taken, side, generator)
            if place is None:
                continue
            which = _randint(0, len(samples.labels) - 1, generator)
            stroke = _resized(samples.ink[which], side, self.quarter_turns)
            taken[place] = True
            ink[place] = stroke
            mask[place] = torch.where(stroke > INK_THRESHOLD, samples.labels[which] + 1, BACKGROUND)
        return self._on_background(ink, generator), mask

    def _free_place(self, taken: Tensor, side: int, generator: Generator) -> tuple[slice, slice] | None:
        for _ in range(ATTEMPTS):
            top, left = (_randint(0, self.canvas - side, generator) for _ in range(2))
            place = (slice(top, top + side), slice(left, left + side))
            if not taken[place].any():
                return place
        return None

    def _on_background(self, ink: Tensor, generator: Generator) -> Tensor:
        """Ink on a background with a brightness gradient and noise: (3, canvas, canvas), 8-bit."""
        corners = torch.rand(1, 1, 2, 2, generator=generator) * 0.3
        size = (self.canvas, self.canvas)
        ground = interpolate(corners, size=size, mode="bilinear", align_corners=True)[0]
        light = torch.maximum(ground, ink[None]).expand(3, -1, -1)
        light = light + NOISE * torch.randn(3, *size, generator=generator)
        light = light.clamp(0, 1)
        return ((1 - light if self.dark_on_light else light) * 255).round().byte()


def _randint(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _resized(ink: Tensor, side: int, quarter_turns: int) -> Tensor:
    large = interpolate(ink[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    return torch.rot90(large, quarter_turns, (0, 1))
