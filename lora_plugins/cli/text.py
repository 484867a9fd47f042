"""Plain text tables, which terminals and pipes show whole and which can be searched."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows with their columns aligned, the first one underlined; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in ruled
    )
