"""Cleanup at the end of a block that Ctrl-C cannot cut short."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ending(put_back: Callable[[], object]) -> Iterator[None]:
    """Runs a cleanup at the end of a block, and once more if the first call was stopped in any of its steps."""
    try:
        try:
            yield
        finally:
            put_back()
    finally:
        put_back()
