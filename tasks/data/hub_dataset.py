"""Data sets of Hugging Face `datasets` (https://huggingface.co/docs/datasets), by hub name or from a local folder."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.tasks.data.image_io import decoded
from lora_plugins.tasks.data.image_module import Item
from lora_plugins.tasks.data.vision_module import TEST, TRAIN, VAL
from lora_plugins.tasks.errors import DataError, unknown

NAMES: Mapping[str, tuple[str, ...]] = {TRAIN: (TRAIN,), VAL: ("validation", "val", "valid"), TEST: (TEST,)}


class HubTable:
    """The splits of a data set, with pictures that are decoded only when they are read.

    Args:
        name: A hub name such as `ethz/food101`, a folder that `save_to_disk` wrote, or one that `load_dataset` reads.
        subset: The configuration of the data set, for those that have several.
        splits: The data set's own name for each of our splits, such as `{val: validation}`; by default the usual ones.
        pictures: The columns with pictures.

    Raises:
        ConfigError: Where `datasets` is not installed, or a column or split does not exist.
        DataError: Where the data set cannot be loaded.
    """

    def __init__(
        self, name: str, subset: str | None, splits: Mapping[str, str] | None, pictures: tuple[str, ...]
    ) -> None:
        self.name, self.pictures = name, pictures
        found = _load(name, subset)
        self.tables = {split: found[own] for split, own in self._splits(found, splits).items()}
        self.features = self.tables[TRAIN].features
        from datasets import Image as Picture

        for column in pictures:
            self.check(column)
            self.tables = {s: t.cast_column(column, Picture(decode=False)) for s, t in self.tables.items()}

    def check(self, column: str) -> None:
        """Refuse a column that is not there.

        Raises:
            ConfigError: With near matches.
        """
        if column not in self.features:
            raise unknown(f"column of {self.name}:", column, self.features)

    def items(self, split: str, targets: list[Any]) -> list[Item]:
        """The rows of a split as samples that are not read yet."""
        names = (f"row {i} of {self.name}, {split}" for i in range(len(targets)))
        return [Item((split, i), target, name) for i, (target, name) in enumerate(zip(targets, names, strict=True))]

    def picture(self, item: Item, column: str) -> Image.Image:
        """Decode a picture of a row.

        Raises:
            DataError: Where it cannot be decoded.
        """
        split, row = item.image
        stored = self.tables[split][row][column]
        if stored is None:
            raise DataError(f"{item.name} has no {column}. Splits without it can be left out: see `splits`.")
        source = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
        return decoded(source, f"{column} in {item.name}")

    def _splits(self, found: Any, given: Mapping[str, str] | None) -> dict[str, str]:
        if given is None:
            usual = {split: next((n for n in names if n in found), None) for split, names in NAMES.items()}
            given = {split: own for split, own in usual.items() if own is not None}
        for split, own in given.items():
            if split not in NAMES:
                raise unknown("split", split, NAMES)
            if own not in found:
                raise unknown(f"split of {self.name}:", own, found)
        if TRAIN not in given:
            raise ConfigError(f"{self.name} has no train split, only {', '.join(found)}. Name one in `splits`.")
        return dict(given)


def _load(name: str, subset: str | None) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Data sets of the hub need the package datasets: pip install 'lora-plugins[datasets]'"
        ) from error
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            return {TRAIN: datasets.load_from_disk(name)}
        return datasets.load_dataset(name, subset)
    # A data set that is a script, which `datasets` no longer runs, is a RuntimeError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The data set {name!r} could not be loaded: {error}") from error
