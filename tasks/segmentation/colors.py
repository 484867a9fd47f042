"""The colors of classes, and masks drawn in them."""

import math
from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""An image (H, W, 3), or the colors of classes (classes, 3), 8-bit."""

Mask = np.ndarray[Any, np.dtype[np.integer[Any]]]
"""Class indices (H, W)."""

CLASS_0 = (20, 20, 20)
HUES = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""The colors of Okabe and Ito (2008) but black, which people who confuse red and green can tell apart."""

IGNORED = (128, 128, 128)
MAX_CLASSES = 256
"""That an 8-bit mask holds."""

OPACITY = 0.5
ROWS = 256
"""How many are blended at a time: the fractions of a large image would fill the memory."""

STRONGEST = 0.8
"""How far a color is moved toward white or black at most."""


def class_colors(classes: int) -> Pixels:
    """A color for each class: dark for class 0, which is usually the background, else Okabe's and Ito's.

    From the ninth class on, the seven hues come again, lighter and darker by turns: these colors differ, but no palette
    of so many can be told apart by everybody.
    """
    rounds = range(math.ceil((classes - 1) / len(HUES)))
    colors = [CLASS_0, *(_shaded(hue, turn) for turn in rounds for hue in HUES)]
    return np.array(colors[:classes], dtype=np.uint8)


def _shaded(hue: tuple[int, int, int], turn: int) -> tuple[int, ...]:
    """A hue as it comes in a turn, from 0: itself, then half way to white and to black, then in between."""
    end = 255 if turn % 2 else 0
    share = STRONGEST * _spread((turn + 1) // 2)
    return tuple(round(channel + (end - channel) * share) for channel in hue)


def _spread(index: int) -> float:
    """The van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ...; every start of it is spread evenly."""
    return int(f"{index:b}"[::-1], 2) / (1 << index.bit_length())


def colorize(mask: Mask, colors: Pixels, ignore_index: int) -> Pixels:
    """A mask as an image; ignored pixels are gray."""
    ignored = mask == ignore_index
    image: Pixels = colors[np.where(ignored, 0, mask)]
    image[ignored] = IGNORED
    return image


def overlay(image: Pixels, mask: Mask, colors: Pixels, ignore_index: int) -> Pixels:
    """An image with its mask over it, half transparent."""
    blended = np.empty_like(image)
    for rows in (slice(top, top + ROWS) for top in range(0, len(image), ROWS)):
        drawn = colorize(mask[rows], colors, ignore_index)
        blended[rows] = (image[rows] * (1 - OPACITY) + drawn * OPACITY).round()
    return blended


def palette_image(mask: Mask, colors: Pixels) -> Image.Image:
    """A mask as an 8-bit image of indices with the colors as its palette."""
    height, width = mask.shape
    image = Image.frombytes("P", (width, height), mask.astype(np.uint8).tobytes())
    image.putpalette(colors.ravel().tolist())
    return image
