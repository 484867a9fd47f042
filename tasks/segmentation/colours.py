"""The colours of classes, and masks drawn in them."""

from __future__ import annotations

import numpy as np
from PIL import Image

GROUND = (20, 20, 20)
IGNORED = (128, 128, 128)
OPACITY = 0.5


def class_colours(classes: int) -> np.ndarray:
    """A colour for each class, (classes, 3), 8-bit: dark for class 0, which mostly is the ground, else a rainbow."""
    from matplotlib import colormaps

    rainbow = colormaps["gist_rainbow"](np.linspace(0, 1, max(1, classes - 1)))[:, :3]
    return np.concatenate([[GROUND], (rainbow * 255).round()])[:classes].astype(np.uint8)


def coloured(mask: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """A mask (H, W) as a picture (H, W, 3), 8-bit; what is ignored is grey."""
    ignored = mask == ignore_index
    picture: np.ndarray = colours[np.where(ignored, 0, mask)]
    picture[ignored] = IGNORED
    return picture


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    """An image (H, W, 3), 8-bit, with its mask over it, half transparent."""
    blended: np.ndarray = image * (1 - OPACITY) + coloured(mask, colours, ignore_index) * OPACITY
    return blended.round().astype(np.uint8)


def palette_picture(mask: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A mask (H, W) as an 8-bit picture of indices with the colours as its palette."""
    picture = Image.frombytes("P", mask.shape[::-1], mask.astype(np.uint8).tobytes())
    picture.putpalette(colours.ravel().tolist())
    return picture
