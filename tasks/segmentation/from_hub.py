"""Images with masks of Hugging Face `datasets`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from PIL import Image

from lora_plugins.tasks.data import HubTable, Item
from lora_plugins.tasks.segmentation.mask_module import MaskDataModule


class HubMaskDataModule(MaskDataModule):
    """Images and masks of a data set of the Hugging Face hub, or of a local one in its format.

    Args:
        name: A hub name such as `merve/scene_parse_150`, or a folder.
        subset: The configuration of the data set, for those that have several.
        splits: The data set's own name for each of our splits: `{train: train, val: validation}`.
        image_column: The column with the images.
        mask_column: The column with the masks.
        check_files: As in `PictureDataModule`; off by default, for such data sets are large and seldom damaged.
        **options: The others of `MaskDataModule`.
    """

    def __init__(
        self,
        name: str,
        *,
        subset: str | None = None,
        splits: dict[str, str] | None = None,
        image_column: str = "image",
        mask_column: str = "annotation",
        check_files: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(check_files=check_files, **options)
        self.name, self.subset, self.split_names = name, subset, splits
        self.image_column, self.mask_column = image_column, mask_column

    @cached_property
    def table(self) -> HubTable:
        """The data set."""
        return HubTable(self.name, self.subset, self.split_names, (self.image_column, self.mask_column))

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows of all splits."""
        return {split: self.table.items(split, [None] * len(table)) for split, table in self.table.tables.items()}, []

    def pictures(self, item: Item) -> tuple[Image.Image, Image.Image]:
        """Decode the two pictures of a row."""
        return self.table.picture(item, self.image_column), self.table.picture(item, self.mask_column)
