"""What a command does before its work, and where none is done."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Looks for no garbage: what imports make stays, and looking through it takes a fifth of their time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def ends_at_once() -> None:
    """Lets the process end, whenever it does, without a last look for garbage, which takes a second of it."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
