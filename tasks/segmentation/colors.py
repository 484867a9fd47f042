"""The colors of classes, and masks drawn in them."""

from __future__ import annotations

import numpy as np
from PIL import Image

GROUND = (20, 20, 20)
IGNORED = (128, 128, 128)
OPACITY = 0.5


def class_colors(classes: int) -> np.ndarray:
    """A color for each class, (classes, 3), 8-bit: dark for class 0, which mostly is the ground, else a rainbow."""
    from matplotlib import colormaps

    rainbow = colormaps["gist_rainbow"](np.linspace(0, 1, max(1, classes - 1)))[:, :3]
    return np.concatenate([[GROUND], (rainbow * 255).round()])[:classes].astype(np.uint8)


def colored(mask: np.ndarray, colors: np.ndarray, ignore_index: int) -> np.ndarray:
    """A mask (H, W) as a picture (H, W, 3), 8-bit; what is ignored is gray."""
    ignored = mask == ignore_index
    picture: np.ndarray = colors[np.where(ignored, 0, mask)]
    picture[ignored] = IGNORED
    return picture


def overlay(image: np.ndarray, mask: np.ndarray, colors: np.ndarray, ignore_index: int) -> np.ndarray:
    """An image (H, W, 3), 8-bit, with its mask over it, half transparent."""
    blended: np.ndarray = image * (1 - OPACITY) + colored(mask, colors, ignore_index) * OPACITY
    return blended.round().astype(np.uint8)


def palette_picture(mask: np.ndarray, colors: np.ndarray) -> Image.Image:
    """A mask (H, W) as an 8-bit picture of indices with the colors as its palette."""
    picture = Image.frombytes("P", mask.shape[::-1], mask.astype(np.uint8).tobytes())
    picture.putpalette(colors.ravel().tolist())
    return picture
