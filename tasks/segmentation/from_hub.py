"""Images and their masks from Hugging Face `datasets`."""

from functools import cached_property
from typing import Any

from PIL import Image

from lora_plugins.field_checks import check_fields
from lora_plugins.tasks.argument_checks import check_columns
from lora_plugins.tasks.data import HUB_CHECKS, HubDataset, Item
from lora_plugins.tasks.segmentation.mask_module import MaskDataModule


class HubMaskDataModule(MaskDataModule):
    """Images and masks of a data set of the Hugging Face hub, or of a local one in its format.

    Args:
        name: A hub name such as `merve/scene_parse_150`, or a folder.
        subset: The configuration of the data set, for those that have several.
        splits: The data set's own name for each of our splits: `{train: train, val: validation}`.
        image_column: The column with the images.
        mask_column: The column with the masks.
        check_files: As in `ImageDataModule`; off by default, as such data sets are large and rarely damaged.
        **options: The other arguments of `MaskDataModule`.

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
        mask_column: str = "annotation",
        check_files: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(check_files=check_files, **options)
        check_fields({"name": name, "subset": subset, "splits": splits}, HUB_CHECKS)
        check_columns(image_column=image_column, mask_column=mask_column)
        self.source, self.subset, self.split_names = name, subset, splits
        self.image_column, self.mask_column = image_column, mask_column

    @cached_property
    def hub_dataset(self) -> HubDataset:
        """The data set, loaded when it is first used."""
        return HubDataset(self.source, self.subset, self.split_names, (self.image_column, self.mask_column))

    def find(self) -> tuple[dict[str, list[Item]], list[str]]:
        """The rows of all splits."""
        source = self.hub_dataset
        return {split: source.items(split, [None] * len(table)) for split, table in source.tables.items()}, []

    def open_pair(self, item: Item) -> tuple[Image.Image, Image.Image]:
        """Decodes the two images of a row."""
        return self.hub_dataset.image(item, self.image_column), self.hub_dataset.image(item, self.mask_column)
