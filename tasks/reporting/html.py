"""An HTML page of tables and figures, in one file."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
td, th { border-bottom: 1px solid #ddd; padding: 0.25rem 0.8rem; text-align: left; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } figure { display: inline-block; margin: 0.5rem; vertical-align: top; }
figcaption { font-weight: 600; } summary { cursor: pointer; font-weight: 600; }
"""


@dataclass(frozen=True)
class Table:
    """A table with a title; if `folded`, it opens at a click."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False

    def html(self) -> str:
        """The table as HTML."""
        lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in self.header) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows]
        table = f"<table>{''.join(lines)}</table>"
        if self.folded:
            return f"<details><summary>{escape(self.title)}</summary>{table}</details>"
        return f"<h2>{escape(self.title)}</h2>{table}"


@dataclass(frozen=True)
class Figure:
    """A figure with a title, as a `data:` URL."""

    title: str
    url: str

    def html(self) -> str:
        """The figure as HTML."""
        title = escape(self.title)
        return f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="{self.url}"></figure>'


def render_page(title: str, parts: Sequence[Table | Figure], note: str) -> str:
    """The whole page, in the order of its parts."""
    body = "\n".join(part.html() for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1><p>{escape(note)}</p>\n{body}\n</body></html>\n"
    )
