"""Where pickles are read: what is in a pickle runs as it is read."""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_FUNCTIONS = (pickle.load, pickle.loads)
"""What reads pickles and is no method of a reader; torch.load makes a reader, except for its `weights_only=True`."""

_IN_PYTHON = pickle._Unpickler.load.__code__
"""The method of the reader that is written in Python, of which that of joblib is one."""


@contextmanager
def places_of_unpickling() -> Iterator[set[str]]:
    """Yields a set to which each place is added, by file and line, where this thread reads a pickle in the block.

    Calls are watched, and no function is replaced: modules may have taken it before, or keep what is in its place. A
    call that C makes, as in `map(pickle.loads, files)`, is not seen.
    """
    found: set[str] = set()

    def watch(frame: FrameType | None, event: str, called: Any) -> None:
        if event == "call" and frame is not None and frame.f_code is _IN_PYTHON:
            frame = frame.f_back
        elif event != "c_call" or not _reads_a_pickle(called):
            return
        if frame is not None:
            found.add(f"{frame.f_code.co_filename}, line {frame.f_lineno}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _reads_a_pickle(called: Any) -> bool:
    """Whether a function or method of C reads a pickle."""
    if any(called is each for each in _FUNCTIONS):
        return True
    return issubclass(type(getattr(called, "__self__", None)), pickle.Unpickler) and called.__name__ == "load"
