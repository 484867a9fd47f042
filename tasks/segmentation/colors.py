"""The colors of classes, and masks drawn in them."""

from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""An image (H, W, 3), or the colors of classes (classes, 3), 8-bit."""

Mask = np.ndarray[Any, np.dtype[np.int64]]
"""Class indices (H, W)."""

CLASS_0 = (20, 20, 20)
IGNORED = (128, 128, 128)
OPACITY = 0.5


def class_colors(classes: int) -> Pixels:
    """A color for each class: dark for class 0, which is usually the background, else a rainbow."""
    from matplotlib import colormaps

    rainbow = colormaps["gist_rainbow"](np.linspace(0, 1, max(1, classes - 1)))[:, :3]
    return np.concatenate([[CLASS_0], (rainbow * 255).round()])[:classes].astype(np.uint8)


def colorize(mask: Mask, colors: Pixels, ignore_index: int) -> Pixels:
    """A mask as an image; ignored pixels are gray."""
    ignored = mask == ignore_index
    image: Pixels = colors[np.where(ignored, 0, mask)]
    image[ignored] = IGNORED
    return image


def overlay(image: Pixels, mask: Mask, colors: Pixels, ignore_index: int) -> Pixels:
    """An image with its mask over it, half transparent."""
    blended = image * (1 - OPACITY) + colorize(mask, colors, ignore_index) * OPACITY
    return blended.round().astype(np.uint8)


def palette_image(mask: Mask, colors: Pixels) -> Image.Image:
    """A mask as an 8-bit image of indices with the colors as its palette."""
    height, width = mask.shape
    image = Image.frombytes("P", (width, height), mask.astype(np.uint8).tobytes())
    image.putpalette(colors.ravel().tolist())
    return image
