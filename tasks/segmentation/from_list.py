"""Images with their masks in a list: CSV, or JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from lora_plugins.tasks.data import Item, open_picture, read_table, split_of
from lora_plugins.tasks.segmentation.mask_module import MaskDataModule


class MaskListDataModule(MaskDataModule):
    """Images listed with their masks in a CSV or JSON lines file.

    Args:
        file: The list: `.csv` with a header, or `.jsonl`.
        root: The folder that relative paths start from; by default that of the list.
        image_column: The column with the path of the image.
        mask_column: The column with the path of the mask.
        split_column: The column that says `train`, `val` or `test`. Where the rows have none, `val_share` splits them.
        **options: Those of `MaskDataModule`.
    """

    def __init__(
        self,
        file: str,
        *,
        root: str | None = None,
        image_column: str = "image",
        mask_column: str = "mask",
        split_column: str = "split",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.file = Path(file)
        self.root = self.file.parent if root is None else Path(root)
        self.columns = (image_column, mask_column, split_column)

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows by split."""
        image, mask, split = self.columns
        items: dict[str, list[Item]] = {}
        for number, row in enumerate(read_table(self.file, (image, mask)), 1):
            paths = [self.root / str(row[column]) for column in (image, mask)]
            where = split_of(row, split, f"Row {number} of {self.file}")
            items.setdefault(where, []).append(Item(*paths, str(paths[1])))
        return items, []

    def pictures(self, item: Item) -> tuple[Image.Image, Image.Image]:
        """Open the two files."""
        return open_picture(item.image), open_picture(item.target)
