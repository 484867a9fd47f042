"""A disk that takes no large file."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """Lets this process write no file of more bytes, as on a full disk, for the duration of the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
