"""What was found in the data: the task, the classes, the splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lora_plugins.errors import counted
from lora_plugins.tasks.autoconfig.mask_coding import MaskCoding
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import TRAIN, VAL

LABELS, MASKS = "image classification", "semantic segmentation"
VAL_SHARE = 0.2
MAX_SIDE, STEP = 512, 32
"""Of images with masks, which keep their size up to a side of 512, in multiples of 32."""


@dataclass(frozen=True)
class Flags:
    """What flags say about the data; None for what is to be inferred."""

    masks: Path | None = None
    classes: tuple[str, ...] | None = None
    ignore_index: int | None = None
    val_share: float | None = None


@dataclass(frozen=True)
class Source:
    """Where images were found.

    Attributes:
        module: The class of the data module, in `lora_plugins.tasks`.
        arguments: Its arguments.
        found: In words, what the task was told from.
        left_out: What lies among the images, or beside their folders, and is not read.
    """

    module: str
    arguments: Mapping[str, Any]
    found: str
    left_out: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Survey(Source):
    """Where images were found, and what they are; the arguments say how masks are read, too, and what is validated on.

    Attributes:
        task: `LABELS` or `MASKS`.
        classes: Names of the classes.
        counts: Images by split.
        size: Height and width for images with masks.
        coding: How masks are read.
        unmeasured: The classes of which no image is validated on.
    """

    task: str
    classes: tuple[str, ...]
    counts: Mapping[str, int]
    size: tuple[int, int] | None = None
    coding: MaskCoding | None = None
    unmeasured: Sequence[str] = ()

    @property
    def named_by(self) -> str:
        """What names the classes."""
        return "--classes --ignore-index" if self.coding is not None else "the names of the folders, or the labels"


def labels_survey(
    source: Source, labels: Mapping[str, Mapping[str, int]], classes: Sequence[str], flags: Flags
) -> Survey:
    """Returns what was found of images with labels.

    `labels` are numbers of images, by split and class.

    Raises:
        DataError: If there are too few to validate on some.
    """
    train = {name: labels[TRAIN].get(name, 0) for name in classes}
    totals = {split: sum(members.values()) for split, members in labels.items()}
    share, counts = _shared(totals, [*train.values()], flags)
    return Survey(
        source.module,
        {**source.arguments, **share},
        source.found,
        source.left_out,
        task=LABELS,
        classes=tuple(classes),
        counts=counts,
        unmeasured=_unmeasured(train, labels.get(VAL), share.get("val_share", 0.0)),
    )


def masks_survey(
    source: Source, counts: Mapping[str, int], sizes: Sequence[tuple[int, int]], coding: MaskCoding, flags: Flags
) -> Survey:
    """Returns what was found of images with masks.

    `counts` are numbers of images by split, `sizes` their widths and heights.

    Raises:
        DataError: If there are too few to validate on some.
    """
    share, counts = _shared(counts, [counts[TRAIN]], flags)
    return Survey(
        source.module,
        {**source.arguments, **coding.arguments(), **share},
        source.found,
        source.left_out,
        task=MASKS,
        classes=coding.classes,
        counts=counts,
        size=_common_size(sizes),
        coding=coding,
    )


def _shared(counts: Mapping[str, int], strata: Sequence[int], flags: Flags) -> tuple[dict[str, float], dict[str, int]]:
    """The argument `val_share`, if there is no val split, and the images by split."""
    if VAL in counts:
        if flags.val_share is not None:
            raise DataError("--val-share makes a val split of data without one, and these have one.")
        return {}, dict(counts)
    share = VAL_SHARE if flags.val_share is None else flags.val_share
    held = sum(round(share * count) for count in strata)
    if not 0 < held < counts[TRAIN]:
        of_classes, of_each = (f" of {len(strata)} classes", " of each class") if len(strata) > 1 else ("", "")
        more = f"two or more{of_each}" if max(strata) == 1 else "or choose another --val-share"
        raise DataError(
            f"A share of {share:g}{of_each} cannot be held out for validation of "
            f"{counted(counts[TRAIN], 'image')}{of_classes}. Add images, {more}."
        )
    return {"val_share": share}, {**counts, TRAIN: counts[TRAIN] - held, VAL: held}


def _unmeasured(train: Mapping[str, int], val: Mapping[str, int] | None, share: float) -> tuple[str, ...]:
    """The classes of which no image is validated on.

    Without `val`, the `share` of each class of `train` is held out for that.
    """
    held = {name: round(share * count) for name, count in train.items()} if val is None else val
    return tuple(name for name in train if not held.get(name))


def _common_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width that fit most images of these widths and heights."""
    width, height = (median(size[side] for size in sizes) for side in (0, 1))
    scale = min(1.0, MAX_SIDE / max(width, height))
    return _rounded(height * scale), _rounded(width * scale)


def _rounded(length: float) -> int:
    return max(STEP, round(length / STEP) * STEP)
