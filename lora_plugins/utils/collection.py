"""The search for garbage in cycles, which takes longest where many objects are made that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from lora_plugins.utils.ending import ending


@contextmanager
def without_collection() -> Iterator[None]:
    """Lets Python search for no garbage in cycles for the time of the block."""
    with ending(gc.enable if gc.isenabled() else gc.disable):
        gc.disable()
        yield
