"""Warnings as the program prints errors: what is said, and not where in the code."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Prints each warning in a line that begins with `warning:`.

    Lightning, when it is imported, sets a format of its own: enter after its import what runs with it.
    """
    before = warnings.formatwarning
    warnings.formatwarning = _line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"warning: {message}\n"
