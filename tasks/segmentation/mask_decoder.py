"""From the picture of a mask to class indices: 8-bit indices, palettes, and colors by a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import DataError

INDEX_MODES = frozenset({"L", "P"})
Color = tuple[int, int, int]


class MaskCode:
    """How masks say which class a pixel has.

    Without colors, a mask is an 8-bit picture of class indices (of a palette picture, its indices count). With
    colors, it is a picture in color, and the table says what each color means.

    Args:
        classes: Names of the classes, in the order of their indices. With colors it may be left out: then the table
            names them, in its order.
        ignore_index: What pixels of no class become, and the index that means this in a mask without colors.
        colors: The color (r, g, b) of each class. A color whose name is not among the classes is ignored.
        reduce_labels: Whether index 0 means no class, and class 0 is written as 1 (ADE20K).

    Raises:
        ConfigError: Where classes and colors do not go together.
    """

    def __init__(
        self,
        classes: Sequence[str] | None,
        ignore_index: int,
        colors: Mapping[str, Sequence[int]] | None = None,
        reduce_labels: bool = False,
    ) -> None:
        if classes is None and colors is None:
            raise ConfigError("Name the `classes`, or give the `colors` that stand for them.")
        self.classes = list(colors or {}) if classes is None else list(classes)
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels
        if colors is not None and reduce_labels:
            raise ConfigError("reduce_labels counts indices down; masks with `colors` have none.")
        if 0 <= ignore_index < len(self.classes):
            raise ConfigError(f"ignore_index is {ignore_index}, which is the class {self.classes[ignore_index]!r}.")
        self.colors = None if colors is None else self._table(colors)

    def decode(self, mask: Image.Image, name: str) -> np.ndarray:
        """The classes of a mask, (H, W), 64-bit integers.

        Args:
            mask: The picture.
            name: What to call it in an error.

        Raises:
            DataError: Where the picture is of another kind, or holds something that is no class.
        """
        return self._indices(mask, name) if self.colors is None else self._from_colors(mask, name)

    def _indices(self, mask: Image.Image, name: str) -> np.ndarray:
        if mask.mode not in INDEX_MODES:
            raise DataError(
                f"{name} has the mode {mask.mode}; a mask is an 8-bit picture with one class index a pixel (mode L or "
                "P). For masks in color give the table `colors`."
            )
        indices = np.asarray(mask).astype(np.int64)
        if self.reduce_labels:
            indices = np.where(indices == 0, self.ignore_index, indices - (indices != self.ignore_index))
        wrong = [int(v) for v in np.unique(indices) if not 0 <= v < len(self.classes) and v != self.ignore_index]
        if wrong:
            allowed = f"0 to {len(self.classes) - 1}, and {self.ignore_index} for what is ignored"
            reduced = " (after reduce_labels)" if self.reduce_labels else ""
            raise DataError(f"{name} holds {', '.join(map(str, wrong))}{reduced}; allowed are {allowed}")
        return indices

    def _from_colors(self, mask: Image.Image, name: str) -> np.ndarray:
        pixels = np.asarray(mask.convert("RGB")).astype(np.int64)
        packed = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
        found, places = np.unique(packed, return_inverse=True)
        table = self.colors or {}
        wrong = [f"#{int(color):06x}" for color in found if int(color) not in table]
        if wrong:
            raise DataError(f"{name} holds the colors {', '.join(wrong[:8])}, which the table `colors` does not name")
        indices = np.array([table[int(color)] for color in found], dtype=np.int64)
        return indices[places].reshape(packed.shape)

    def _table(self, colors: Mapping[str, Sequence[int]]) -> dict[int, int]:
        missing = [name for name in self.classes if name not in colors]
        if missing:
            raise ConfigError(f"`colors` has no color for the classes {', '.join(missing)}.")
        table: dict[int, int] = {}
        for name, color in colors.items():
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ConfigError(f"The color of {name!r} is {list(color)}; it takes three numbers from 0 to 255.")
            packed = (color[0] << 16) | (color[1] << 8) | color[2]
            if packed in table:
                raise ConfigError(f"The color {list(color)} of {name!r} stands for another name too.")
            table[packed] = self.classes.index(name) if name in self.classes else self.ignore_index
        return table
