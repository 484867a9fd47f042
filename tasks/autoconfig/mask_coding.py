"""The meaning of the values of masks: indices, black and white, gray levels, or colors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from lora_plugins.errors import counted, listing
from lora_plugins.tasks.autoconfig.mask_values import BLACK, GRAY, IN_COLOR, WHITE, Value, mask_values
from lora_plugins.tasks.errors import DataError
from lora_plugins.tasks.files import open_image

IGNORED = 255
"""The value of a mask that stands for no class, unless a flag says another one."""


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

    def shown(self, name: str) -> str:
        """A class with the gray level or color that it is given to, unless its name says that."""
        if self.colors is None:
            return name
        color = self.colors[name]
        value = f"#{bytes(color).hex()}" if self.kind == IN_COLOR else str(color[0])
        return name if name.endswith(f"_{value.lstrip('#')}") else f"{name} ({value})"


def mask_coding(
    paths: Sequence[Any],
    names: Sequence[str] | None,
    ignored: int | None,
    read: Callable[[Any], Image.Image] = open_image,
) -> MaskCoding:
    """Infers how masks are read, from every one of them.

    Gray masks whose values leave most indices out, such as 0 and 255, or 0, 128 and 255, are gray levels; others hold
    indices.

    Masks are paths, or what else `read` reads as it is stored; as text, they are named in messages.

    Raises:
        DataError: As `mask_values` does, or if they hold values without a name, or one value alone.
    """
    found = mask_values(paths, read)
    values: list[Any] = sorted(found.where)
    coding = _coded(found.kind, values, names, ignored, found.where)
    void = {ignored} if ignored or coding.colors is not None else {ignored, IGNORED}
    counted = [each for each in values if each not in void] or [each for each in values if each != ignored] or values
    if len(coding.classes) < 2 or len(counted) < 2:
        left_out = [value for value in values if value not in counted]
        beside = f" beside the ignored {listing(left_out)}" if left_out else ""
        levels = " 0 and 255 are black and white: name 2 classes, in this order." if values == [BLACK, WHITE] else ""
        raise DataError(
            f"All masks hold one value, {counted[0]}{beside}, and there is nothing to tell apart. A mask holds one "
            f"value for each class, the background included.{levels if names and ignored is None else ''}"
            f"{_white_ignored(values, ignored)}"
        )
    return coding


def _coded(
    kind: str, values: Sequence[Any], names: Sequence[str] | None, ignored: int | None, where: Mapping[Value, object]
) -> MaskCoding:
    if kind == IN_COLOR:
        return _of_colors(kind, {f"color_{bytes(color).hex()}": color for color in values}, names)
    levels = [value for value in values if value != ignored]
    if kind == GRAY and _are_levels(values, ignored) and (names is None or len(names) == len(levels)):
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
            f"The masks are {kind} and hold {counted(len(colors), 'color')}, and "
            f"{counted(len(names), 'class is', 'classes are')} named. They are, in this order: "
            f"{', '.join(f'#{bytes(color).hex()}' for color in colors.values())}"
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
            f"{where[value]} holds the value {value}, and {counted(len(names), 'class is', 'classes are')} named "
            f"({', '.join(names)}), from {int(reduce_labels)} on. Name all classes, or say which value stands for "
            f"none: --ignore-index {value}.{_white_ignored(values, ignored)}"
        )
    classes = tuple(names) if names is not None and count else tuple(f"class_{index}" for index in range(count))
    if ignored is not None and 0 < ignored < len(classes):
        raise DataError(
            f"--ignore-index is {ignored}, and the values of the classes go on above it, to {len(classes) - 1}. What "
            "stands for no class is 0, or a value above all classes."
        )
    return MaskCoding("indices", classes, IGNORED if ignored is None or reduce_labels else ignored, None, reduce_labels)


def _white_ignored(values: Sequence[Any], ignored: int | None) -> str:
    """Says how 255 counts, where it is one of two values and nobody has said that it stands for no class."""
    asked = ignored is None and len(values) == 2 and values[1] == WHITE and values[0] != BLACK
    return f" If {WHITE} is a class as well, say --ignore-index {BLACK}." if asked else ""
