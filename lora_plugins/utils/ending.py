"""The end of a block, which Ctrl-C may hit as well."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ending(put_back: Callable[[], object]) -> Iterator[None]:
    """Calls at the end of a block what puts something back, twice: where the first call is stopped, the second is not.

    Args:
        put_back: May be called again from any of its steps.
    """
    try:
        try:
            yield
        finally:
            put_back()
    finally:
        put_back()
