"""A process in which nothing is unpickled: what is in a pickle runs as it is read."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_READERS = ("load", "loads", "Unpickler")
"""What reads pickles, as torch.load does except for its `weights_only=True`, and NumPy where arrays hold objects."""


@contextmanager
def no_unpickling() -> Iterator[None]:
    """Lets all that reads a pickle fail with an UnpicklingError for the duration of the block."""
    readers = {name: getattr(pickle, name) for name in _READERS}
    for name in _READERS:
        setattr(pickle, name, _Refusing)
    try:
        yield
    finally:
        for name, reader in readers.items():
            setattr(pickle, name, reader)


class _Refusing:
    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise pickle.UnpicklingError("a pickle is read, which can run anything")
