"""Labeled images of Hugging Face `datasets`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from PIL import Image

from lora_plugins.tasks.data import HubTable, Item, PictureDataModule


class HubImageDataModule(PictureDataModule):
    """Images and labels of a data set of the Hugging Face hub, or of a local one in its format.

    Args:
        name: A hub name such as `ethz/food101`, or a folder.
        subset: The configuration of the data set, for those that have several.
        splits: The data set's own name for each of our splits: `{train: train, val: validation}`.
        image_column: The column with the images.
        label_column: The column with the labels.
        check_files: As in `PictureDataModule`; off by default, for such data sets are large and seldom damaged.
        **options: The others of `PictureDataModule`.
    """

    def __init__(
        self,
        name: str,
        *,
        subset: str | None = None,
        splits: dict[str, str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        check_files: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(check_files=check_files, **options)
        self.name, self.subset, self.split_names = name, subset, splits
        self.image_column, self.label_column = image_column, label_column

    @cached_property
    def table(self) -> HubTable:
        """The data set."""
        table = HubTable(self.name, self.subset, self.split_names, (self.image_column,))
        table.check(self.label_column)
        return table

    @property
    def class_names(self) -> list[str]:
        """The names that the data set gives its labels, or all labels."""
        names = getattr(self.table.features[self.label_column], "names", None)
        return list(names) if names else [str(label) for label in self._labels]

    @cached_property
    def _labels(self) -> list[Any]:
        return sorted({label for table in self.table.tables.values() for label in table[self.label_column]})

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows of all splits."""
        named = hasattr(self.table.features[self.label_column], "names")
        number = {label: i for i, label in enumerate([] if named else self._labels)}
        items = {}
        for split, table in self.table.tables.items():
            labels = [int(label) if named else number[label] for label in table[self.label_column]]
            items[split] = self.table.items(split, labels)
        return items, []

    def read(self, item: Item) -> tuple[Image.Image, int]:
        """Decode an image; its class is known."""
        return self.table.picture(item, self.image_column).convert("RGB"), item.target
