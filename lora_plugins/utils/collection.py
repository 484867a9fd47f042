"""The search for garbage in cycles, which takes longest where many objects are made that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lora_plugins.utils.ending import ending


@contextmanager
def without_collection() -> Iterator[None]:
    """Lets Python search for no garbage in cycles for the duration of the block.

    Where blocks of several threads overlap, the search goes on with the end of the first: none leaves it off.
    """
    if not gc.isenabled():
        yield
        return
    with ending(gc.enable):
        gc.disable()
        yield
