"""Images and their labels from a list: CSV, or JSON lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_plugins.field_checks import check_names, optional
from lora_plugins.tasks.argument_checks import check_columns, check_path
from lora_plugins.tasks.data import ImageDataModule, Item
from lora_plugins.tasks.errors import MAX_LISTED, unknown
from lora_plugins.tasks.files import SPLIT_COLUMN, path_key, read_list, row_split


class ImageListDataModule(ImageDataModule):
    """Images listed with their labels in a CSV or JSON lines file.

    Args:
        file: The list: `.csv` with a header, or `.jsonl`.
        root: The folder that paths are relative to; by default that of the list.
        image_column: The column with the path of the image.
        label_column: The column with the name of the class.
        split_column: The column that says `train`, `val` or `test`; without a `split`, `val_share` splits the rows.
        classes: Names of the classes, in order; by default all labels, sorted.
        **options: The arguments of `ImageDataModule`.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        file: str,
        *,
        root: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        split_column: str = SPLIT_COLUMN,
        classes: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        optional(check_names)("classes", classes)
        check_path("file", file)
        optional(check_path)("root", root)
        check_columns(image_column=image_column, label_column=label_column, split_column=split_column)
        self.file = Path(file)
        self.root = self.file.parent if root is None else Path(root)
        self.columns = (image_column, label_column, split_column)
        self._classes = [] if classes is None else list(classes)

    @property
    def class_names(self) -> list[str]:
        """The given names, or all labels, sorted."""
        image, label, _ = self.columns
        self._classes = self._classes or sorted({str(row[label]) for row in read_list(self.file, (image, label))})
        return self._classes

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows by split, and the rows whose label is no class, or contradicts an earlier row."""
        image, label, split = self.columns
        items: dict[str, list[Item]] = {}
        problems: list[str] = []
        labels: dict[Path, tuple[str, int]] = {}
        targets = {name: at for at, name in reversed([*enumerate(self.class_names)])}  # the first of a name counts
        for number, row in enumerate(read_list(self.file, (image, label), split), 1):
            where = f"Row {number} of {self.file}"
            name, path = str(row[label]), self.root / str(row[image])
            if name not in targets:
                is_listed = len(problems) < MAX_LISTED  # near names take long to find
                problems.append(f"{where}: {unknown('class', name, self.class_names) if is_listed else name}")
                continue
            first, at = labels.setdefault(path, (name, number))
            if first != name:
                problems.append(f"{where}: {path} has the label {name!r}, and in row {at} {first!r}")
                continue
            item = Item(path, targets[name], str(path), path_key(row[image], self.root))
            items.setdefault(row_split(row, split, where), []).append(item)
        return items, problems
