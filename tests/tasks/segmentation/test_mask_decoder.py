"""From mask images to class indices."""

import numpy as np
import pytest
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
)
from lora_plugins.tasks.segmentation import MaskDecoder

COLORS = {"sky": [0, 0, 255], "road": [128, 64, 128], "void": [0, 0, 0]}


class TestMaskDecoder:
    def picture(self, *colors):
        return Image.fromarray(np.array([colors], dtype=np.uint8))

    def test_colors_by_a_table(self):
        code = MaskDecoder(["sky", "road"], 255, COLORS)
        found = code.decode(self.picture([128, 64, 128], [0, 0, 255], [0, 0, 0]), "m")
        assert found.tolist() == [[1, 0, 255]]

    def test_colors_of_a_palette_of_numpy(self):
        """Of 8 bits, in which red and green would be lost when the three are written in one number."""
        palette = np.array([[200, 0, 0], [0, 200, 0], [7, 7, 7]], dtype=np.uint8)
        code = MaskDecoder(None, 255, dict(zip("abc", palette, strict=True)))
        assert code.decode(self.picture([7, 7, 7], [0, 200, 0], [200, 0, 0]), "m").tolist() == [[2, 1, 0]]

    def test_the_table_names_the_classes(self):
        assert MaskDecoder(None, 255, COLORS).classes == ["sky", "road", "void"]

    def test_an_unknown_color(self):
        with pytest.raises(DataError, match="m holds the colors #010203"):
            MaskDecoder(None, 255, COLORS).decode(self.picture([1, 2, 3]), "m")

    def test_a_palette_counts_by_its_indices(self):
        picture = Image.fromarray(np.array([[1, 0]], dtype=np.uint8)).convert("P")
        picture.putdata([1, 0])
        picture.putpalette([9, 9, 9, 7, 7, 7])
        assert MaskDecoder(["a", "b"], 255).decode(picture, "m").tolist() == [[1, 0]]

    def test_reduced_labels(self):
        picture = Image.fromarray(np.array([[0, 1, 2, 255]], dtype=np.uint8))
        assert MaskDecoder(["a", "b"], 255, reduce_labels=True).decode(picture, "m").tolist() == [[255, 0, 1, 255]]

    @pytest.mark.parametrize(("ignored", "value"), [(254, 255), (255, 254), (3, 4), (-100, 255)])
    def test_a_value_above_the_classes_is_named_as_it_is_written(self, ignored, value):
        """One less may be the value that is ignored."""
        decoder = MaskDecoder(["a", "b"], ignored, reduce_labels=True)
        picture = Image.fromarray(np.array([[0, 1, value]], dtype=np.uint8))
        with pytest.raises(DataError, match=f"m holds {value}; allowed are 1 to 2, and 0 or {ignored} for what is"):
            decoder.decode(picture, "m")

    @pytest.mark.parametrize(
        ("classes", "ignored", "size"),
        [(2, 255, 1), (256, 256, 8), (2, -100, 8)],
        ids=["255 is ignored", "256 is ignored", "a negative value is ignored"],
    )
    def test_masks_of_photos_are_held_in_8_bits_where_these_suffice(self, classes, ignored, size):
        picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
        found = MaskDecoder([f"c{at}" for at in range(classes)], ignored).decode(picture, "m")
        assert (found.tolist(), found.itemsize) == ([[0, 1]], size)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param((None, 255), "Name the `classes`", id="nothing"),
            pytest.param((["a"], 255, COLORS), "no color for the classes a", id="no color"),
            pytest.param((["a", "b"], 1), "is the class 'b'", id="ignored class"),
            pytest.param(
                (["a", "b"], 2, None, True),
                "ignore_index is 2, which is how masks with reduce_labels write the class 'b'",
                id="ignored class before it is reduced",
            ),
            pytest.param((None, 255, {"a": [1, 2]}), "three whole numbers", id="short"),
            pytest.param((None, 255, {"a": [0.1, 0.5, 0.9]}), "three whole numbers", id="shares"),
            pytest.param((None, 255, {"a": "red"}), "'red'; it takes three whole numbers", id="a word"),
            pytest.param((None, 255, {"a": [1, 2, 3], "b": [1, 2, 3]}), "another name", id="twice"),
        ],
    )
    def test_wrong_tables(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            MaskDecoder(*arguments)
