"""Images and their masks from a list: CSV, or JSON lines."""

from pathlib import Path
from typing import Any

from lora_plugins.field_checks import optional
from lora_plugins.tasks.argument_checks import check_columns, check_path
from lora_plugins.tasks.data import Item
from lora_plugins.tasks.files import SPLIT_COLUMN, path_key, read_list, row_split
from lora_plugins.tasks.segmentation.mask_module import MaskDataModule


class MaskListDataModule(MaskDataModule):
    """Images listed with their masks in a CSV or JSON lines file.

    Args:
        file: The list: `.csv` with a header, or `.jsonl`.
        root: The folder that paths are relative to; by default that of the list.
        image_column: The column with the path of the image.
        mask_column: The column with the path of the mask.
        split_column: The column that says `train`, `val` or `test`; without a `split`, `val_share` splits the rows.
        **options: The arguments of `MaskDataModule`.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        file: str,
        *,
        root: str | None = None,
        image_column: str = "image",
        mask_column: str = "mask",
        split_column: str = SPLIT_COLUMN,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_path("file", file)
        optional(check_path)("root", root)
        check_columns(image_column=image_column, mask_column=mask_column, split_column=split_column)
        self.file = Path(file)
        self.root = self.file.parent if root is None else Path(root)
        self.columns = (image_column, mask_column, split_column)

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows by split."""
        image, mask, split = self.columns
        items: dict[str, list[Item]] = {}
        for number, row in enumerate(read_list(self.file, (image, mask), split), 1):
            image_path, mask_path = (self.root / str(row[column]) for column in (image, mask))
            name = row_split(row, split, f"Row {number} of {self.file}")
            key = path_key(row[mask], self.root)
            items.setdefault(name, []).append(Item(image_path, mask_path, str(mask_path), key))
        return items, []
