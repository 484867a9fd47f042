"""Images and their labels from Hugging Face `datasets`."""

from functools import cached_property
from typing import Any

from PIL import Image

from lora_plugins.field_checks import check_fields
from lora_plugins.tasks.argument_checks import check_columns
from lora_plugins.tasks.data import HUB_CHECKS, HubDataset, ImageDataModule, Item
from lora_plugins.tasks.files import as_rgb


class HubImageDataModule(ImageDataModule):
    """Images and labels of a data set of the Hugging Face hub, or of a local one in its format.

    Args:
        name: A hub name such as `ethz/food101`, or a folder.
        subset: The configuration of the data set, for those that have several.
        splits: The data set's own name for each of our splits: `{train: train, val: validation}`.
        image_column: The column with the images.
        label_column: The column with the labels.
        check_files: As in `ImageDataModule`; off by default, as such data sets are large and rarely damaged.
        **options: The other arguments of `ImageDataModule`.

    Raises:
        ConfigError: If an argument is invalid.
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
        check_fields({"name": name, "subset": subset, "splits": splits}, HUB_CHECKS)
        check_columns(image_column=image_column, label_column=label_column)
        self.source, self.subset, self.split_names = name, subset, splits
        self.image_column, self.label_column = image_column, label_column

    @cached_property
    def hub_dataset(self) -> HubDataset:
        """The data set, loaded when it is first used."""
        loaded = HubDataset(self.source, self.subset, self.split_names, (self.image_column,))
        loaded.check_column(self.label_column)
        return loaded

    @property
    def class_names(self) -> list[str]:
        """The names that the data set gives its labels, or all labels, sorted."""
        names = getattr(self.hub_dataset.features[self.label_column], "names", None)
        return list(names) if names else [str(label) for label in self._labels]

    @cached_property
    def _labels(self) -> list[Any]:
        source, column = self.hub_dataset, self.label_column
        return sorted({label for split in source.tables for label in source.labels(split, column)[0]} - {None})

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows of all splits, and those without a label."""
        named = hasattr(self.hub_dataset.features[self.label_column], "names")
        index = {label: i for i, label in enumerate([] if named else self._labels)}
        items: dict[str, list[Item]] = {}
        problems: list[str] = []
        for split in self.hub_dataset.tables:
            labels, wrong = self.hub_dataset.labels(split, self.label_column)
            problems += wrong
            targets = [label if label is None else int(label) if named else index[label] for label in labels]
            items[split] = [item for item in self.hub_dataset.items(split, targets) if item.target is not None]
        return items, problems

    def read(self, item: Item) -> tuple[Image.Image, int]:
        """Decodes an image; its class is known from its row."""
        image = self.hub_dataset.image(item, self.image_column, self.resized_to)
        return as_rgb(image, item.name), item.target
