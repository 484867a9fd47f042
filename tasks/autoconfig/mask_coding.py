"""The meaning of the values of masks: indices, black and white, gray levels, or colors."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from lora_plugins.tasks.errors import DataError, listed
from lora_plugins.tasks.files import open_image

IGNORED = 255
"""The value of a mask that stands for no class, unless a flag says another one."""

BLACK, WHITE = 0, 255
GRAY_MODES = frozenset({"1", "L"})
COLOR_MODES = frozenset({"RGB", "RGBA"})
MAX_COLORS = 256
THREADS = 4

Value = int | tuple[int, ...]
"""A gray value or index, or a color (r, g, b)."""

Shown = tuple[int, tuple[int, ...]]
"""An index, and the color that a palette gives it."""


@dataclass(frozen=True)
class MaskCoding:
    """How masks are read.

    Attributes:
        kind: What the values are, in words.
        classes: Names of the classes, in the order of their indices.
        ignore_index: The index of pixels that are not counted.
        colors: The color of each class, if values are no indices.
        reduce_labels: Whether 0 stands for no class, and 1 for the first one.
    """

    kind: str
    classes: tuple[str, ...]
    ignore_index: int = IGNORED
    colors: Mapping[str, Sequence[int]] | None = None
    reduce_labels: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of a `MaskDataModule`."""
        colors = {} if self.colors is None else {"colors": {name: [*color] for name, color in self.colors.items()}}
        reduced = {"reduce_labels": True} if self.reduce_labels else {}
        return {"classes": [*self.classes], "ignore_index": self.ignore_index, **colors, **reduced}


def mask_coding(
    paths: Sequence[Any],
    names: Sequence[str] | None,
    ignored: int | None,
    read: Callable[[Any], Image.Image] = open_image,
) -> MaskCoding:
    """Infers how masks are read, from every one of them.

    Gray masks whose values leave most indices out, such as 0 and 255, or 0, 128 and 255, are gray levels; others hold
    indices.

    Args:
        paths: The masks, or what else `read` reads; as text, they are named in messages.
        names: Names of the classes, if they are known.
        ignored: The value that stands for no class, if it is known.
        read: Reads a mask as it is stored.

    Raises:
        DataError: If masks cannot be read, or are of several kinds, or hold too many colors, or values without a name.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        seen = list(threads.map(partial(_values, read=read), paths))
    wrong = [each for each in seen if isinstance(each, DataError)]
    if wrong:
        raise DataError(f"{len(wrong)} of {len(paths)} masks cannot be used:\n{listed([str(each) for each in wrong])}")
    kinds: dict[str, set[Value]] = {}
    where: dict[Value, object] = {}
    shown: dict[Shown, object] = {}
    for path, found in zip(paths, seen, strict=True):
        assert not isinstance(found, DataError)
        kind, values, colors = found
        kinds.setdefault(kind, set()).update(values)
        where |= {value: path for value in values if value not in where}
        shown |= {pair: path for pair in colors if pair not in shown}
    if len(kinds) > 1:
        raise DataError(f"Some masks are {' and others '.join(sorted(kinds))}. Write all of them alike.")
    _check_palettes(shown)
    ((kind, values),) = kinds.items()
    if len(values) > MAX_COLORS:
        raise DataError(
            f"The masks hold {len(values)} colors together, more than {MAX_COLORS}: they were smoothed, or a color in "
            "one means something else in another. A color stands for one class in all masks"
        )
    coding = _coded(kind, sorted(values), names, ignored, where)
    if len(coding.classes) < 2:
        counted = sorted(values - {ignored}) or sorted(values)
        beside = f" beside the ignored {ignored}" if ignored in values and len(values) > 1 else ""
        raise DataError(
            f"All masks hold one value, {counted[0]}{beside}, and there is nothing to tell apart. A mask holds one "
            "value for each class, the background included."
        )
    return coding


def _check_palettes(shown: Mapping[Shown, object]) -> None:
    """Refuses palettes by which indices have several colors, and colors several indices.

    Programs that make files smaller leave them so, as each file has a palette of its own: only the colors mean classes.
    """
    indices, colors = ({pair[side] for pair in shown} for side in (0, 1))
    if len(shown) in (len(indices), len(colors)):
        return
    index = next(index for index in sorted(indices) if sum(index == each for each, _ in shown) > 1)
    where = [f"#{bytes(color).hex()} in {path}" for (each, color), path in shown.items() if each == index]
    raise DataError(
        f"The value {index} is {' and '.join(where[:2])}, and one color has several values: these are no "
        "indices of classes. Write the masks in color (RGB), or all with one palette."
    )


def _values(path: Any, read: Callable[[Any], Image.Image]) -> tuple[str, set[Value], Collection[Shown]] | DataError:
    try:
        mask = read(path)
    except DataError as error:
        return error
    if mask.mode in COLOR_MODES:
        counted = mask.convert("RGB").getcolors(MAX_COLORS)
        if counted is None:
            return DataError(
                f"{path} holds more than {MAX_COLORS} colors: it is a photo, or was smoothed. A mask is written "
                "without loss (PNG) and scaled without interpolation"
            )
        colors = Counter({color: count for count, color in counted if isinstance(color, tuple)})
        if _are_smoothed(colors):
            return DataError(
                f"{path} is of two colors with {len(colors) - 2} others, as smoothing leaves them between the two. "
                "Scale masks without interpolation"
            )
        return "in color", set(colors), ()
    if mask.mode in GRAY_MODES or mask.mode == "P":
        gray: Any = mask.convert("L") if mask.mode == "1" else mask
        counts = Counter({int(value): count for count, value in gray.getcolors()})
        if _is_smoothed(counts):
            return DataError(
                f"{path} is black and white with {len(counts) - 2} grays between, as smoothing leaves them. Scale "
                "masks without interpolation"
            )
        return "palette images" if mask.mode == "P" else "gray", set(counts), _shown(mask, counts)
    return DataError(f"{path} has the mode {mask.mode}; a mask is an 8-bit image: gray, with a palette, or in color")


def _shown(mask: Image.Image, indices: Iterable[int]) -> Collection[Shown]:
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
    """Whether a color is a mixture of two others, but for rounding."""
    widest = max(range(3), key=lambda channel: abs(last[channel] - first[channel]))
    share = (color[widest] - first[widest]) / (last[widest] - first[widest])
    mixture = [start + share * (end - start) for start, end in zip(first, last, strict=True)]
    return 0 < share < 1 and all(abs(value - mixed) <= 1 for value, mixed in zip(color, mixture, strict=True))


def _coded(
    kind: str, values: Sequence[Any], names: Sequence[str] | None, ignored: int | None, where: Mapping[Value, object]
) -> MaskCoding:
    if kind == "in color":
        return _of_colors(kind, {f"color_{bytes(color).hex()}": color for color in values}, names)
    levels = [value for value in values if value != ignored]
    if kind == "gray" and _are_levels(values, ignored) and (names is None or len(names) == len(levels)):
        return _of_levels(levels, names, [value for value in values if value == ignored])
    return _of_indices(values, names, ignored, where)


def _are_levels(values: Sequence[int], ignored: int | None) -> bool:
    if [*values] == [BLACK, WHITE]:
        return ignored not in values
    indices = [value for value in values if value not in (IGNORED, ignored)]
    if len(indices) == 1 and ignored not in (None, IGNORED):  # then 255 is what it is told apart from
        indices = [value for value in values if value != ignored]
    return len(indices) > 1 and 2 * len(indices) < max(indices) + 1 - (ignored == 0)


def _of_levels(levels: Sequence[int], names: Sequence[str] | None, void: Sequence[int]) -> MaskCoding:
    kind, usual = "gray levels", tuple(f"gray_{value}" for value in levels)
    if [*levels] == [BLACK, WHITE]:
        kind, usual = "black and white", ("background", "object") if names is None else ("black", "white")
    coding = _of_colors(kind, {name: (value,) * 3 for name, value in zip(usual, levels, strict=True)}, names)
    return replace(coding, colors={**(coding.colors or {}), **{f"gray_{value}": (value,) * 3 for value in void}})


def _of_colors(kind: str, colors: Mapping[str, Sequence[int]], names: Sequence[str] | None) -> MaskCoding:
    if names is None:
        return MaskCoding(kind, tuple(colors), colors=colors)
    if set(names) <= set(colors):  # what has no name among the classes is ignored
        return MaskCoding(kind, tuple(names), colors=colors)
    if len(names) != len(colors):
        raise DataError(
            f"The masks are {kind} and hold {len(colors)} colors, and {len(names)} classes are named. They are, in "
            f"this order: {', '.join(f'#{bytes(color).hex()}' for color in colors.values())}"
        )
    return MaskCoding(kind, tuple(names), colors=dict(zip(names, colors.values(), strict=True)))


def _of_indices(
    values: Sequence[int], names: Sequence[str] | None, ignored: int | None, where: Mapping[Value, object]
) -> MaskCoding:
    reduce_labels = ignored == 0
    unseen = {IGNORED} if ignored is None or reduce_labels else {ignored}
    indices = [value - reduce_labels for value in values if value not in unseen and not (reduce_labels and value == 0)]
    count = max(indices, default=-1) + 1
    if names is not None and count > len(names):
        value = count - 1 + reduce_labels
        raise DataError(
            f"{where[value]} holds the value {value}, and {len(names)} classes are named ({', '.join(names)}), from "
            f"{int(reduce_labels)} on. Name all classes, or say which value stands for none: --ignore-index {value}."
        )
    classes = tuple(names) if names is not None and count else tuple(f"class_{index}" for index in range(count))
    if ignored is not None and 0 < ignored < len(classes):
        raise DataError(
            f"--ignore-index is {ignored}, and the values of the classes go on above it, to {len(classes) - 1}. What "
            "stands for no class is 0, or a value above all classes."
        )
    return MaskCoding("indices", classes, IGNORED if ignored is None or reduce_labels else ignored, None, reduce_labels)
