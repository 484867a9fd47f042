"""What data modules with masks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lora_plugins.tasks.data import Item, PictureDataModule
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.segmentation.mask_decoder import MaskCode


class MaskDataModule(PictureDataModule):
    """A data module over images with a mask each.

    Args:
        classes: Names of the classes, in the order of their indices in the masks.
        ignore_index: A value of the masks that stands for no class; the task must be given the same.
        colors: For masks in color: the color (r, g, b) of each class. A color whose name is not among `classes` is
            ignored; without `classes`, the table names them.
        reduce_labels: Whether index 0 means no class and class 0 is written as 1, as in ADE20K.
        batch_size: Images a batch.
        **options: Those of `PictureDataModule`.
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
        self.code = MaskCode(classes, ignore_index, colors, reduce_labels)

    @property
    def class_names(self) -> list[str]:
        """The names that were given."""
        return self.code.classes

    @abstractmethod
    def pictures(self, item: Item) -> tuple[Image.Image, Image.Image]:
        """The image and the mask of a sample, as they are stored."""

    def read(self, item: Item) -> tuple[Image.Image, np.ndarray]:
        """Read a sample.

        Raises:
            DataError: Where a picture cannot be read, the two differ in size, or the mask holds what is no class.
        """
        image, mask = self.pictures(item)
        if image.size != mask.size:
            raise DataError(f"{item.name} is {_by(mask)}, its image is {_by(image)} (height x width)")
        return image.convert("RGB"), self.code.decode(mask, item.name)


def _by(picture: Image.Image) -> str:
    return f"{picture.height}x{picture.width}"
