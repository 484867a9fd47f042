"""From mask images to class indices: 8-bit indices, palettes, and colors by a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.field_checks import check_flag, check_names, check_options, check_whole, optional, shown
from lora_plugins.tasks.argument_checks import check_ignored
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import as_rgb

INDEX_MODES = frozenset({"L", "P"})
VALUES, COLORS = 2**8, 2**24
"""How many values a pixel of a mask can have, and how many colors."""

Labels = np.ndarray[Any, np.dtype[np.integer[Any]]]
"""Class indices, (H, W)."""


class MaskDecoder:
    """Decodes mask images to class indices.

    Without colors, a mask is an 8-bit image of class indices (for a palette image, the indices of its palette). With
    colors, it is a color image, and the table says which class a color stands for.

    Args:
        classes: Names of the classes, in the order of their indices. Optional with colors: the names in the table, in
            their order, are the default.
        ignore_index: The index of pixels without a class, in the result and in masks without colors.
        colors: The color (r, g, b) of each class. A color whose name is not in `classes` is ignored.
        reduce_labels: Whether index 0 means no class, and class 0 is written as 1 (ADE20K).

    Raises:
        ConfigError: If the arguments do not go together.
    """

    def __init__(
        self,
        classes: Sequence[str] | None,
        ignore_index: int,
        colors: Mapping[str, Sequence[int]] | None = None,
        reduce_labels: bool = False,
    ) -> None:
        optional(check_names)("classes", classes)
        optional(check_options)("colors", colors)
        check_whole("ignore_index", ignore_index)
        check_flag("reduce_labels", reduce_labels)
        names = colors if classes is None else classes
        if names is None:
            raise ConfigError("Name the `classes`, or give the `colors` that stand for them.")
        self.classes = list(names)
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels
        if colors is not None and reduce_labels:
            raise ConfigError("reduce_labels counts indices down; masks with `colors` have none.")
        check_ignored(ignore_index, self.classes)
        if reduce_labels and ignore_index == len(self.classes):
            raise ConfigError(
                f"ignore_index is {ignore_index}, which is how masks with reduce_labels write the class "
                f"{self.classes[-1]!r}. Take a value above it: such as 255."
            )
        self.colors = None if colors is None else self._table(colors)
        self._dtype: Any = np.uint8 if 0 <= ignore_index < VALUES else np.int64

    def decode(self, mask: Image.Image, name: str) -> Labels:
        """The classes of a mask, (H, W), in 8 bits where these suffice, as photos are large, or else in 64.

        Raises:
            DataError: If the image is of another kind, or holds an unknown class.
        """
        if self.colors is None:
            return self._from_indices(mask, name)
        return _from_colors(mask, name, self.colors, self._dtype)

    def _from_indices(self, mask: Image.Image, name: str) -> Labels:
        if mask.mode not in INDEX_MODES:
            raise DataError(
                f"{name} has the mode {mask.mode}; a mask is an 8-bit image with one class index a pixel (mode L or "
                "P). For masks in color give the table `colors`."
            )
        written = np.arange(VALUES, dtype=np.int64)
        ignored = (written == self.ignore_index) | (written < self.reduce_labels)
        indices = written - self.reduce_labels
        known = ignored | (indices < len(self.classes))
        wrong = [str(value) for value in np.flatnonzero(mask.histogram()) if not known[value]]
        if wrong:
            first = int(self.reduce_labels)
            allowed = f"{first} to {first + len(self.classes) - 1}, and {'0 or ' * first}{self.ignore_index}"
            raise DataError(f"{name} holds {', '.join(wrong)}; allowed are {allowed} for what is ignored")
        table = np.where(ignored, self.ignore_index, indices)
        is_small = self._dtype == np.uint8  # which Pillow looks up in a third of the time that numpy takes
        return np.array(mask.point(table.tolist())) if is_small else table.take(np.asarray(mask))

    def _table(self, colors: Mapping[str, Sequence[int]]) -> dict[int, int]:
        missing = [name for name in self.classes if name not in colors]
        if missing:
            raise ConfigError(f"`colors` has no color for the classes {', '.join(missing)}.")
        table: dict[int, int] = {}
        for name, color in colors.items():
            try:
                red, green, blue = bytes([*color])
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"The color of {name!r} is {shown(color)}; it takes three whole numbers from 0 to 255."
                ) from error
            packed = (red << 16) | (green << 8) | blue
            if packed in table:
                raise ConfigError(f"The color {[red, green, blue]} of {name!r} stands for another name too.")
            table[packed] = self.classes.index(name) if name in self.classes else self.ignore_index
        return table


def _from_colors(mask: Image.Image, name: str, table: Mapping[int, int], dtype: Any) -> Labels:
    red, green, blue = np.moveaxis(np.asarray(as_rgb(mask, name)), -1, 0).astype(np.int32)
    packed = (red << 16) | (green << 8) | blue
    places = np.zeros(COLORS, np.int32)  # of which memory is taken where colors are
    places[[*table]] = np.arange(1, len(table) + 1)
    found = places[packed]
    if not found.all():
        wrong = [f"#{color:06x}" for color in np.unique(packed[found == 0])]
        raise DataError(f"{name} holds the colors {', '.join(wrong[:8])}, which the table `colors` does not name")
    labels: Labels = np.array([0, *table.values()], dtype).take(found)
    return labels
