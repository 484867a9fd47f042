"""The colors of classes."""

from itertools import combinations

import numpy as np
import pytest
from PIL import ImageColor

from lora_plugins.tasks.segmentation import class_colors, colorize, overlay

# Viénot, Brettel and Mollon (1999): what people see who lack the cones for red, or for green; in linear RGB.
LINEAR = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
WITHOUT = {
    "red": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
    "green": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
}


XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def seen_without(cone, colors):
    """Colors (N, 3), 8-bit, as they are seen without the cones for red or green, in CIELAB."""
    lms = LINEAR @ ((colors / 255.0) ** 2.2).T
    linear = (np.linalg.inv(LINEAR) @ (WITHOUT[cone] @ lms)).clip(0, 1).T
    ratios = linear @ XYZ.T / WHITE
    x, y, z = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize("cone", WITHOUT)
def test_eight_classes_can_be_told_apart_without_a_kind_of_cones(cone):
    """A difference of 2 can just be seen; two of the rainbow of earlier versions had 5."""
    seen = seen_without(cone, class_colors(8).astype(float))
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15


def test_they_begin_with_the_palette_of_okabe_and_ito():
    hues = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
    assert class_colors(8)[1:].tolist() == [list(ImageColor.getrgb(hue)) for hue in hues]


def test_no_two_of_256_classes_have_one_color():
    colors = class_colors(256)
    assert colors.shape == (256, 3)
    assert len(np.unique(colors, axis=0)) == 256
    assert not (colors == 128).all(1).any()  # that of ignored pixels


@pytest.mark.parametrize("classes", [1, 2, 9, 40])
def test_a_class_keeps_its_color_when_there_are_more(classes):
    assert class_colors(classes).tolist() == class_colors(100)[:classes].tolist()


def test_ignored_pixels_are_gray():
    colors = class_colors(2)
    assert colorize(np.array([[1, 255]]), colors, 255).tolist() == [[[230, 159, 0], [128, 128, 128]]]
    assert overlay(np.zeros((1, 2, 3), np.uint8), np.array([[1, 255]]), colors, 255).max() == 115


def test_an_image_of_more_rows_than_are_blended_at_once():
    random = np.random.default_rng(0)
    image, mask = random.integers(0, 256, (600, 5, 3), np.uint8), random.integers(0, 4, (600, 5))
    mask[:, 0] = 255
    blended = overlay(image, mask, colors := class_colors(4), 255)
    assert np.array_equal(blended, (image * 0.5 + colorize(mask, colors, 255) * 0.5).round())
    assert np.array_equal(blended, overlay(image, mask.astype(np.uint8), colors, 255))
