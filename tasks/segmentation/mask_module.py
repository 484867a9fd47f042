"""The data module that all data modules with masks inherit from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lora_plugins.tasks.data import ImageDataModule, Item
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import as_rgb, open_image
from lora_plugins.tasks.segmentation.mask_decoder import MaskDecoder


class MaskDataModule(ImageDataModule):
    """A data module over images with one mask each.

    Args:
        classes: Names of the classes, in the order of their indices in the masks.
        ignore_index: The value of the masks that stands for no class; the task needs the same.
        colors: For masks in color: the color (r, g, b) of each class. A color whose name is not in `classes` is
            ignored; without `classes`, the names in this table are the classes.
        reduce_labels: Whether index 0 means no class and class 0 is written as 1, as in ADE20K.
        batch_size: Images per batch.
        **options: The arguments of `ImageDataModule`.
    """

    has_masks = True

    def __init__(
        self,
        *,
        classes: Sequence[str] | None = None,
        ignore_index: int = 255,
        colors: Mapping[str, Sequence[int]] | None = None,
        reduce_labels: bool = False,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        self.ignore_index = ignore_index
        super().__init__(batch_size=batch_size, **options)
        self.decoder = MaskDecoder(classes, ignore_index, colors, reduce_labels)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, given or of the table."""
        return self.decoder.classes

    def open_pair(self, item: Item) -> tuple[Image.Image, Image.Image]:
        """The image and the mask of a sample, as they are stored: by default in files."""
        return open_image(item.image), open_image(item.target)

    def read(self, item: Item) -> tuple[Image.Image, np.ndarray[Any, Any]]:
        """Reads a sample.

        Raises:
            DataError: If an image cannot be read, the two differ in size, or the mask holds an unknown class.
        """
        image, mask = self.open_pair(item)
        if image.size != mask.size:
            raise DataError(f"{item.name} is {_dimensions(mask)}, its image is {_dimensions(image)} (height x width)")
        return as_rgb(image, item.image), self.decoder.decode(mask, item.name)

    def explain_missing(self) -> str:
        """Says what masks have to hold, and how masks of black and white are read."""
        last = len(self.class_names) - 1
        return (
            f"In a mask, the values 0 to {last} stand for the classes, and {self.ignore_index} for pixels that are not "
            "counted. Where a mask is a picture instead, such as black for one class and white for another, give the "
            "color of each class: colors: {background: [0, 0, 0], object: [255, 255, 255]}."
        )


def _dimensions(image: Image.Image) -> str:
    return f"{image.height}x{image.width}"
