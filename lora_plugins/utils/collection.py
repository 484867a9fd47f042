"""Python's cyclic garbage collector, which takes longest where many objects are made that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lora_plugins.utils.ending import ending


@contextmanager
def without_collection() -> Iterator[None]:
    """Switches the cyclic garbage collector off for the duration of the block.

    Where blocks of several threads overlap, it is on again at the end of the first one: none leaves it off.
    """
    if not gc.isenabled():
        yield
        return
    with ending(gc.enable):
        gc.disable()
        yield
