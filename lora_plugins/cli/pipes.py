"""The end of a command whose output nobody reads to its end, as in `lora-plugins plugins | head -1`."""

import os
import select
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


def ending_quietly(command: Callable[P, int]) -> Callable[P, int]:
    """Lets a command end without a word, and with the exit code 1, when the reader of its output goes away.

    A pipe to somebody else that breaks, such as one to a process that loads data, is the error that it was.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return _flushed(command, *args, **kwargs)
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            # Python flushes what is still buffered at its very end, where nothing could catch the error again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return run


def _flushed(command: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    try:
        code = command(*args, **kwargs)
    except SystemExit:  # of `--help`
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
