"""What is remembered of samples that were read before training, and warnings about all of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image

from lora_plugins.errors import listing
from lora_plugins.tasks.data.samples import Item
from lora_plugins.tasks.files import TRAIN

STRIP = 64
DARK = 64
"""A value of 255 that some pixel of a set of images reaches; less is left of 14 bits in files of 16."""


@dataclass(frozen=True)
class Seen:
    """What is remembered of a sample that was read: classes, a digest of its image, and its largest value, of 255."""

    classes: frozenset[int]
    pixels: bytes
    brightest: int

    @classmethod
    def of(cls, image: Image.Image, target: Any, ignored: int | None) -> "Seen":
        """Looks at an image with its class index or mask, without the label that is ignored."""
        labels = frozenset(np.unique(np.asarray(target)).tolist())
        return cls(labels - {ignored}, _digest(image), int(np.max(image.getextrema())))


def warn_of_darkness(seen: Iterable[Seen]) -> None:
    """Warns of images that are all nearly black: of 16 bits, the upper 8 are taken, and cameras fill 10, 12 or 14."""
    brightest = max(each.brightest for each in seen)
    if brightest < DARK:
        rank_zero_warn(
            f"The brightest pixel of all images is {brightest} of 255: they are nearly black. If values of, say, 12 "
            "bits are stored in 16, rescale them so that the largest one possible is white, here and in the images to "
            "predict for."
        )


def warn_of_repeats(items: Mapping[str, Sequence[Item]], seen: Mapping[int, Seen], classes: Sequence[str]) -> None:
    """Warns of images that are listed twice, or, where all were read, copied: into another split, or another class."""
    splits: dict[Any, dict[str, str]] = defaultdict(dict)
    labels: dict[Any, dict[int, str]] = defaultdict(dict)
    for split, members in items.items():
        for item in members:
            place = str(item.image) if isinstance(item.image, Path) else item.name
            picture = seen[id(item)].pixels if seen else item.image
            splits[picture][split] = place
            if isinstance(item.target, int) and 0 <= item.target < len(classes):  # others, such as -1, are no labels
                labels[picture][item.target] = f"{place} ({classes[item.target]})"
    repeated = [" = ".join(dict.fromkeys(of.values())) for of in splits.values() if TRAIN in of and len(of) > 1]
    if repeated:
        rank_zero_warn(
            f"{len(repeated)} image{'s are' if len(repeated) > 1 else ' is'} in train and in another split, so that "
            f"metrics are of what was trained on: {listing(repeated, 3)}."
        )
    if ambiguous := [" = ".join(of.values()) for of in labels.values() if len(of) > 1]:
        rank_zero_warn(
            f"{len(ambiguous)} image{'s have' if len(ambiguous) > 1 else ' has'} several labels, of which one at most "
            f"is learned: {listing(ambiguous, 3)}. Leave each image under one label."
        )


def _digest(image: Image.Image) -> bytes:
    """A digest of size and pixels, by strips: the bytes of a large image at once take longer than to decode it."""
    digest = sha256(f"{image.size}".encode())
    for top in range(0, image.height, STRIP):
        digest.update(image.crop((0, top, image.width, top + STRIP)).tobytes())
    return digest.digest()
