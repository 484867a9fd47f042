"""Data sets of Hugging Face `datasets` (https://huggingface.co/docs/datasets), by hub name or from a local folder."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.field_checks import Check, check_name, map_of, optional
from lora_plugins.tasks.data.samples import Item
from lora_plugins.tasks.data.transforms import Size
from lora_plugins.tasks.errors import DataError, unknown
from lora_plugins.tasks.files import TEST, TRAIN, VAL, decode_image

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {TRAIN: (TRAIN,), VAL: ("validation", "val", "valid"), TEST: (TEST,)}

HUB_CHECKS: Mapping[str, Check] = {
    "name": check_name,
    "subset": optional(check_name),
    "splits": optional(map_of(check_name)),
}
"""What the arguments of a `HubDataset` can be but its columns, which are names."""


class HubDataset:
    """The splits of a data set, whose images are decoded only when they are read.

    Args:
        name: A hub name such as `ethz/food101`, a folder that `save_to_disk` wrote, or one that `load_dataset` reads.
        subset: The configuration of the data set, for those that have several; `save_to_disk` writes one.
        splits: The data set's own name for each of our splits, such as `{val: validation}`; by default the usual ones.
        image_columns: The columns with images.

    Raises:
        ConfigError: If `datasets` is not installed, there is no such column or split, or a subset of a saved one.
        DataError: If the data set cannot be loaded.
    """

    def __init__(
        self, name: str, subset: str | None, splits: Mapping[str, str] | None, image_columns: Sequence[str]
    ) -> None:
        self.name = name
        loaded = _load(name, subset)
        self.tables = {split: loaded[own] for split, own in self._own_splits(loaded, splits).items()}
        self.features = self.tables[TRAIN].features
        self._encoded = {column: self._not_decoded(column) for column in image_columns}

    def check_column(self, column: str) -> None:
        """Checks that a column exists.

        Raises:
            ConfigError: If it does not, with near matches.
        """
        if column not in self.features:
            raise unknown(f"column of {self.name}:", column, self.features)

    def labels(self, split: str, column: str) -> tuple[list[Any], list[str]]:
        """The labels of a split, None for those that are none, and what is wrong with these.

        A test split may hold -1, the label of `datasets` for none: it can be predicted all the same.
        """
        names = getattr(self.features[column], "names", None)
        known = None if names is None else range(-1 if split == TEST else 0, len(names))
        values = list(self.tables[split][column])
        labels = [value if _is_label(value, known) else None for value in values]
        wrong = [(self.item(split, row, None), values[row]) for row, label in enumerate(labels) if label is None]
        return labels, [f"{row.name} has {value!r} as its {column}" for row, value in wrong]

    def items(self, split: str, targets: Sequence[Any]) -> list[Item]:
        """The rows of a split as samples that are not read yet."""
        return [self.item(split, row, target) for row, target in enumerate(targets)]

    def item(self, split: str, row: int, target: Any) -> Item:
        """A row of a split as a sample that is not read yet."""
        return Item((split, row), target, f"row {row} of {self.name}, {split}", str(row))

    def image(self, item: Item, column: str, resized_to: Size | None = None) -> Image.Image:
        """Decodes an image of a row.

        Raises:
            DataError: If it cannot be decoded.
        """
        split, row = item.image
        stored = self._encoded[column][split][row][column]
        if stored is None:
            raise DataError(f"{item.name} has no {column}. Splits without it can be left out: see `splits`.")
        source = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
        return decode_image(source, f"{column} in {item.name}", resized_to)

    def _not_decoded(self, column: str) -> Mapping[str, Any]:
        """The images of a column by split, encoded and alone: `datasets` decodes all that is in a row that is read."""
        from datasets import Image as ImageFeature

        self.check_column(column)
        alone = {split: table.select_columns(column) for split, table in self.tables.items()}
        return {split: table.cast_column(column, ImageFeature(decode=False)) for split, table in alone.items()}

    def _own_splits(self, loaded: Any, splits: Mapping[str, str] | None) -> dict[str, str]:
        if splits is None:
            usual = {split: next((n for n in names if n in loaded), None) for split, names in USUAL_NAMES.items()}
            splits = {split: own for split, own in usual.items() if own is not None}
        for split, own in splits.items():
            if split not in USUAL_NAMES:
                raise unknown("split", split, USUAL_NAMES)
            if own not in loaded:
                raise unknown(f"split of {self.name}:", own, loaded)
        if TRAIN not in splits:
            raise ConfigError(f"{self.name} has no train split, only {', '.join(loaded)}. Name one in `splits`.")
        return dict(splits)


def _is_label(value: Any, known: range | None) -> bool:
    """Whether a value is one of the known labels; if none are, whether it is a text or a number, and not NaN."""
    if known is not None:
        return value in known
    return isinstance(value, str | int) or (isinstance(value, float) and not math.isnan(value))


def _load(name: str, subset: str | None) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Data sets of the hub need the package datasets: pip install 'lora-plugins[datasets]'"
        ) from error
    folder = Path(name)
    is_one = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    saved = is_one or (folder / "dataset_dict.json").is_file()
    if saved and subset is not None:
        raise ConfigError(
            f"subset is {subset!r}, and {name} was saved by save_to_disk, which has no others. Leave it out."
        )
    try:
        if saved:
            return {TRAIN: datasets.load_from_disk(name)} if is_one else datasets.load_from_disk(name)
        return datasets.load_dataset(name, subset)
    # A data set that is a script, which `datasets` no longer runs, is a RuntimeError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The data set {name!r} could not be loaded: {error}") from error
