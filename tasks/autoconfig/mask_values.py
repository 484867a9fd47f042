"""The values of masks as they are stored, read from every one of them: gray values, indices of palettes, or colors."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import read_all

BLACK, WHITE = 0, 255
IN_COLOR, GRAY, OF_PALETTES = "in color", "gray", "palette images"
"""The kinds of masks, in words."""

GRAY_MODES = frozenset({"1", "L"})
COLOR_MODES = frozenset({"RGB", "RGBA"})
MAX_COLORS = 256

Value = int | tuple[int, ...]
"""A gray value or index, or a color (r, g, b)."""

Shown = tuple[int, tuple[int, ...]]
"""An index, and the color that a palette gives it."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class MaskValues:
    """What occurs in a mask, or in several.

    Attributes:
        kind: `IN_COLOR`, `GRAY` or `OF_PALETTES`.
        where: By value, the first mask that holds it.
        shown: By index and color of a palette, the first mask that has it so.
    """

    kind: str
    where: Mapping[Value, object]
    shown: Mapping[Shown, object]


def mask_values(masks: Sequence[Any], read: Callable[[Any], Image.Image]) -> MaskValues:
    """Reads what occurs in masks, which as text are named in messages.

    Raises:
        DataError: If masks cannot be read, or are of several kinds, or hold too many colors.
    """
    read_values = [*read_all(masks, partial(_values, read=read))]
    wrong = [str(each) for each in read_values if isinstance(each, DataError)]
    if wrong:
        raise DataError(f"{len(wrong)} of {len(masks)} masks cannot be used:\n{listed(wrong)}")
    found = [each for each in read_values if not isinstance(each, DataError)]
    kinds = sorted({each.kind for each in found})
    if len(kinds) > 1:
        raise DataError(f"Some masks are {' and others '.join(kinds)}. Write all of them alike.")
    where, shown = _first(each.where for each in found), _first(each.shown for each in found)
    _check_palettes(shown)
    if len(where) > MAX_COLORS:
        raise DataError(
            f"The masks hold {len(where)} colors together, more than {MAX_COLORS}: they were smoothed, or a color in "
            "one means something else in another. A color stands for one class in all masks"
        )
    return MaskValues(kinds[0], where, shown)


def _first(tables: Iterable[Mapping[Key, object]]) -> dict[Key, object]:
    """The tables in one, in which the first of a key counts."""
    found: dict[Key, object] = {}
    for table in tables:
        found |= {key: value for key, value in table.items() if key not in found}
    return found


def _check_palettes(shown: Mapping[Shown, object]) -> None:
    """Refuses palettes by which indices have several colors, and colors several indices.

    Programs that make files smaller leave them so, as each file has a palette of its own: only the colors mean classes.
    Where each color has one index, they may have done so to masks of few classes, or several programs drew the same
    indices: a warning says what is taken for one class.
    """
    indices, colors = (Counter(pair[side] for pair in shown) for side in (0, 1))
    index = next((index for index in sorted(indices) if indices[index] > 1), None)
    if index is None:
        return
    where = [f"#{bytes(color).hex()} in {path}" for (each, color), path in shown.items() if each == index]
    said = f"The value {index} is {' and '.join(where[:2])}, and"
    if len(colors) < len(shown):
        raise DataError(
            f"{said} one color has several values: these are no indices of classes. Write the masks in color (RGB), "
            "or all with one palette."
        )
    warnings.warn(f"{said} is taken for one class. If it is not, write the masks in color (RGB).", stacklevel=2)


def _values(path: Any, read: Callable[[Any], Image.Image]) -> MaskValues:
    mask = read(path)
    if mask.mode in COLOR_MODES:
        counted = mask.convert("RGB").getcolors(MAX_COLORS)
        if counted is None:
            raise DataError(
                f"{path} holds more than {MAX_COLORS} colors: it is a photo, or was smoothed. A mask is written "
                "without loss (PNG) and scaled without interpolation"
            )
        colors = Counter({color: count for count, color in counted if isinstance(color, tuple)})
        if _are_smoothed(colors):
            raise DataError(
                f"{path} is of two colors with {len(colors) - 2} others, as smoothing leaves them between the two. "
                "Scale masks without interpolation"
            )
        return MaskValues(IN_COLOR, dict.fromkeys(colors, path), {})
    if mask.mode in GRAY_MODES or mask.mode == "P":
        gray: Any = mask.convert("L") if mask.mode == "1" else mask
        counts = Counter({int(value): count for count, value in gray.getcolors()})
        if _is_smoothed(counts):
            raise DataError(
                f"{path} is black and white with {len(counts) - 2} grays between, as smoothing leaves them. Scale "
                "masks without interpolation"
            )
        kind, shown = OF_PALETTES if mask.mode == "P" else GRAY, dict.fromkeys(_shown(mask, counts), path)
        return MaskValues(kind, dict.fromkeys(counts, path), shown)
    raise DataError(f"{path} has the mode {mask.mode}; a mask is an 8-bit image: gray, with a palette, or in color")


def _shown(mask: Image.Image, indices: Iterable[int]) -> list[Shown]:
    """The colors that tell indices apart in the palette of a mask; none for gray ones, or beyond its end.

    Where several are of one color, as in palettes that are filled with black, that color tells nothing.
    """
    flat = mask.getpalette("RGB") or []
    colors = {index: tuple(flat[3 * index : 3 * index + 3]) for index in indices if 3 * index < len(flat)}
    counts = Counter(colors.values())
    return [(index, color) for index, color in colors.items() if counts[color] == 1]


def _is_smoothed(counts: Counter[int]) -> bool:
    """Whether nearly all of a mask is black and white, and the rest is many grays between."""
    extremes = counts[BLACK] + counts[WHITE]
    return len(counts) > 8 and counts[BLACK] > 0 and counts[WHITE] > 0 and extremes > 0.7 * counts.total()


def _are_smoothed(colors: Counter[tuple[int, ...]]) -> bool:
    """Whether nearly all of a mask is of two colors, and many of the rest are mixtures of these.

    Grays may be indices that were written as colors, of which only black and white are far apart.
    """
    (first, one), (last, other) = [*colors.most_common(2), ((), 0), ((), 0)][:2]
    if len(colors) <= 8 or one + other <= 0.7 * colors.total():
        return False
    are_gray = len({*first}) == len({*last}) == 1
    if are_gray and {first[0], last[0]} != {BLACK, WHITE}:
        return False
    return sum(_is_between(color, first, last) for color in colors) > 6


def _is_between(color: Sequence[int], first: Sequence[int], last: Sequence[int]) -> bool:
    """Whether a color is a mixture of two others, except for rounding."""
    widest = max(range(3), key=lambda channel: abs(last[channel] - first[channel]))
    share = (color[widest] - first[widest]) / (last[widest] - first[widest])
    mixture = [start + share * (end - start) for start, end in zip(first, last, strict=True)]
    return 0 < share < 1 and all(abs(value - mixed) <= 1 for value, mixed in zip(color, mixture, strict=True))
