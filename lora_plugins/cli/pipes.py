"""The end of a command whose reader closes the pipe early, as in `lora-plugins plugins | head -1`."""

import io
import os
import select
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


def exit_on_closed_output(command: Callable[P, int]) -> Callable[P, int]:
    """Ends a command without a message and with exit code 1 when the reader of its output closes the pipe.

    Another pipe that breaks, such as one to a process that loads data, is still an error.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return _flushed(command, *args, **kwargs)
        except BrokenPipeError:
            if not _output_is_closed():
                raise
            # Python flushes its buffers when the process ends, where nothing could catch a second error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return run


def _flushed(command: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    try:
        code = command(*args, **kwargs)
    except SystemExit:  # of `--help`
        _flush()
        raise
    _flush()
    return code


def _flush() -> None:
    if sys.stdout is not None:  # as it is where a process starts without one
        sys.stdout.flush()


def print_any_text() -> None:
    """Lets characters that the encoding of the output lacks be printed, with backslashes, as Python does for errors.

    In the locale C, Python lets bytes of file names through, and nothing else that is not ASCII.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _output_is_closed() -> bool:
    if sys.stdout is None or not hasattr(select, "poll"):  # Windows has none
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
