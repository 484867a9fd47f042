"""Contact sheets: many pictures in one, in rows with a name."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from lora_plugins import ConfigError

GAP, SMALLEST = 4, 48
"""Pixels between pictures, and the side to which smaller ones are enlarged by whole factors."""


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Returns a picture of rows of pictures, each with its name above it.

    Args:
        rows: By name, the pictures of a row.

    Raises:
        ConfigError: If there are none.
    """
    if not any(rows.values()):
        raise ConfigError("A contact sheet needs at least one picture.")
    drawn = {name: [_enlarged(picture) for picture in pictures] for name, pictures in rows.items()}
    width = max(sum(p.width + GAP for p in pictures) for pictures in drawn.values()) + GAP
    line = 14 if any(drawn) else 0
    heights = [line + max((p.height for p in pictures), default=0) + GAP for pictures in drawn.values()]
    width = max([width, *(GAP + 7 * len(name) for name in drawn)])
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    top = GAP
    for (name, pictures), height in zip(drawn.items(), heights, strict=True):
        ImageDraw.Draw(sheet).text((GAP, top), name, fill="black")
        left = GAP
        for picture in pictures:
            sheet.paste(picture, (left, top + line))
            left += picture.width + GAP
        top += height
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, -(-SMALLEST // min(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
