"""Surveys a list of images with labels or masks: CSV, JSON lines."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_plugins.errors import listing
from lora_plugins.tasks.autoconfig.folders import class_names
from lora_plugins.tasks.autoconfig.found import Flags, Source, Survey, labels_survey, masks_survey
from lora_plugins.tasks.autoconfig.lookalikes import images_of_list_elsewhere
from lora_plugins.tasks.autoconfig.mask_coding import mask_coding
from lora_plugins.tasks.autoconfig.readable import check_no_problems, equal_sizes, unreadable
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import SPLIT_COLUMN, TRAIN, read_list, row_split

Rows = Sequence[Mapping[str, Any]]
Pairs = Sequence[tuple[Path, Path]]


def list_survey(data: Path, flags: Flags) -> Survey:
    """Surveys a list with a column of labels or masks; reads its masks, and the headers of images.

    Raises:
        DataError: If it cannot be trained on, with the reason, and what to do.
    """
    if flags.masks is not None:
        raise DataError(f"--masks is a folder; the masks of {data} are in its column 'mask'.")
    rows = read_list(data, ("image",))
    columns = [name for name in ("mask", "label") if any(row.get(name) not in (None, "") for row in rows)]
    if not columns:
        raise DataError(
            f"{data} has the columns {listing(rows[0])}. It needs one called 'label', or one called 'mask'."
        )
    column = columns[0]
    rows = read_list(data, ("image", column))
    splits = _splits(data, rows)
    images = [data.parent / str(row["image"]) for row in rows]
    if not any(path.exists() for path in images):
        raise images_of_list_elsewhere(data, str(rows[0]["image"]))
    unread = sorted({name for row in rows for name in row if name} - {"image", column, "split"})
    found = f"a list of {column}s{f', without its {listing(unread)}' if unread else ''}"
    if column == "mask":
        pairs = [(image, data.parent / str(row["mask"])) for image, row in zip(images, rows, strict=True)]
        return _of_masks(data, pairs, splits, found, flags)
    check_no_problems(unreadable(images))
    return _of_labels(data, splits, found, flags)


def _splits(data: Path, rows: Rows) -> dict[str, Rows]:
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows, 1):
        splits.setdefault(row_split(row, SPLIT_COLUMN, f"Row {number} of {data}"), []).append(row)
    if TRAIN not in splits:
        raise DataError(f"No row of {data} is of the split {TRAIN!r}.")
    return {**splits}


def _of_masks(data: Path, pairs: Pairs, splits: Mapping[str, Rows], found: str, flags: Flags) -> Survey:
    sizes = equal_sizes(pairs)
    coding = mask_coding([mask for _, mask in pairs], flags.classes or class_names(data.parent), flags.ignore_index)
    source = Source("MaskListDataModule", {"file": str(data.absolute())}, found)
    return masks_survey(source, {split: len(members) for split, members in splits.items()}, sizes, coding, flags)


def _of_labels(data: Path, splits: Mapping[str, Rows], found: str, flags: Flags) -> Survey:
    if flags.ignore_index is not None:
        raise DataError(f"--ignore-index is for masks; {data} has labels.")
    labels = {split: Counter(str(row["label"]) for row in members) for split, members in splits.items()}
    occurring = {*itertools.chain(*labels.values())}
    classes = flags.classes or tuple(sorted(occurring))
    if unnamed := sorted(occurring - {*classes}):
        raise DataError(f"{data} has the labels {listing(unnamed)}, which --classes does not name.")
    if unlearned := sorted(occurring - {*labels[TRAIN]}):
        raise DataError(f"{data} has the labels {listing(unlearned)}, of which no row is of the split {TRAIN!r}.")
    if len(classes) < 2:
        raise DataError(f"All rows of {data} have the label {classes[0]!r}, and there is nothing to tell apart.")
    chosen = {} if flags.classes is None else {"classes": [*classes]}
    source = Source("ImageListDataModule", {"file": str(data.absolute()), **chosen}, found)
    return labels_survey(source, labels, classes, flags)
