"""Surveys a data set of Hugging Face `datasets`: by its name on the hub, or in a folder that `datasets` wrote."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lora_plugins.errors import listing
from lora_plugins.tasks.autoconfig.found import Flags, Source, Survey, labels_survey, masks_survey
from lora_plugins.tasks.autoconfig.mask_coding import mask_coding
from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import TRAIN
from lora_plugins.tasks.hub import hub_answers

if TYPE_CHECKING:
    from lora_plugins.tasks.data import HubDataset

PREFIXES = ("hf://datasets/", "hf://", "datasets:")
"""What DATA begins with that is a data set of `datasets`."""

WRITTEN = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote."""

IMAGES = ("image", "images", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "class", "category")
MEASURED = 100
"""Images whose sizes are looked at."""


def hub_name(data: str) -> str | None:
    """Returns the name, or the folder, of a data set of `datasets`; None for other data."""
    prefix = next((prefix for prefix in PREFIXES if data.startswith(prefix)), None)
    if prefix is not None:
        return data.removeprefix(prefix)
    return data if any((Path(data) / name).is_file() for name in WRITTEN) else None


def hub_survey(name: str, flags: Flags) -> Survey:
    """Surveys a data set; reads its labels, or its masks.

    Raises:
        ConfigError: If `datasets` is not installed.
        DataError: If it cannot be reached or trained on, with the reason, and what to do.
    """
    if flags.masks is not None:
        raise DataError(f"--masks is a folder; the masks of {name} are in one of its columns.")
    local = Path(name).exists()
    if not local and not hub_answers():
        raise DataError(
            f"The data set {name} is on the Hugging Face hub, which cannot be reached from here. Where it can: "
            f"datasets.load_dataset({name!r}).save_to_disk(FOLDER); then lora-plugins train FOLDER."
        )
    from lora_plugins.tasks.data import HubDataset

    found = HubDataset(str(Path(name).absolute()) if local else name, None, None, ())
    images = [column for column, feature in found.features.items() if type(feature).__name__ == "Image"]
    if not images:
        raise DataError(f"{name} has the columns {listing(found.features)}, and none of them holds images.")
    image = next((column for column in IMAGES if column in images), images[0])
    others = [column for column in images if column != image]
    return _of_masks(found, image, others[0], flags) if others else _of_labels(found, image, flags)


def _of_labels(found: "HubDataset", image: str, flags: Flags) -> Survey:
    if flags.classes is not None or flags.ignore_index is not None:
        raise DataError(f"--classes and --ignore-index are for masks; {found.name} has labels.")
    coded = [column for column, feature in found.features.items() if hasattr(feature, "names")]
    column = next(iter([*coded, *(name for name in LABEL_COLUMNS if name in found.features)]), None)
    if column is None:
        raise DataError(f"{found.name} has the columns {listing(found.features)}, and none of labels, such as 'label'.")
    labels = _known_labels(found, column)
    if len({*labels[TRAIN]}) < 2:
        raise DataError(f"All rows of {found.name} have one label, and there is nothing to tell apart.")
    told = getattr(found.features[column], "names", None)
    every = sorted({*itertools.chain(*labels.values())})
    classes = dict(enumerate(told)) if told else {value: str(value) for value in every}
    arguments = {"name": found.name, "image_column": image, "label_column": column, "check_files": True}
    source = Source("HubImageDataModule", arguments, f"a data set with labels in {column!r}")
    counts = {split: Counter(classes.get(value, "") for value in values) for split, values in labels.items()}
    return labels_survey(source, counts, [*classes.values()], flags)


def _known_labels(found: "HubDataset", column: str) -> Mapping[str, Sequence[Any]]:
    """The labels of each split, or what is wrong with them, all at once."""
    read = {split: found.labels(split, column) for split in found.tables}
    problems = [problem for _, wrong in read.values() for problem in wrong]
    if problems:
        rows = sum(len(values) for values, _ in read.values())
        raise DataError(
            f"{len(problems)} of {rows} rows have no label:\n{listed(problems)}\nTake them out of the data set; "
            "or run `fit` with a configuration that says on_problem: skip of the data, which leaves them out."
        )
    return {split: values for split, (values, _) in read.items()}


@dataclass(frozen=True)
class _Cell:
    """An image of a row, which messages name."""

    data: "HubDataset"
    split: str
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.column} in row {self.row} of {self.data.name}, {self.split}"

    def read(self) -> Image.Image:
        """Reads it as it is stored."""
        return self.data.image(self.data.item(self.split, self.row, None), self.column)


def _of_masks(found: "HubDataset", image: str, column: str, flags: Flags) -> Survey:
    from lora_plugins.tasks.data import HubDataset

    data = HubDataset(found.name, None, None, (image, column))
    counts = {split: len(table) for split, table in data.tables.items()}
    cells = [_Cell(data, split, row, column) for split, count in counts.items() for row in range(count)]
    coding = mask_coding(cells, flags.classes, flags.ignore_index, _Cell.read)
    sizes = [_Cell(data, TRAIN, row, image).read().size for row in range(min(MEASURED, counts[TRAIN]))]
    arguments = {"name": found.name, "image_column": image, "mask_column": column, "check_files": True}
    source = Source("HubMaskDataModule", arguments, f"a data set with masks in {column!r}")
    return masks_survey(source, counts, sizes, coding, flags)
