"""What a command does before its work."""

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

from lora_plugins.cli.commands import INTERRUPTED, TERMINATED

_SPINS = "GOMP_SPINCOUNT"

_ENDS: Mapping[int, tuple[int, bytes]] = {
    signal.SIGINT: (INTERRUPTED, b"Interrupted.\n"),
    signal.SIGTERM: (TERMINATED, b"Ended by SIGTERM.\n"),
}
"""The codes and the words with which signals end a process."""

_KEPT = {-3: 2**30, -1: 2**31 - 1}
"""By their numbers in GNU's malloc.h, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes."""

_OF_MALLOC = frozenset({"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"})
"""Environment variables that say what of this the user wants."""


def share_processors() -> None:
    """Lets threads of torch that wait for others sleep soon, where the environment says nothing of it.

    Those of GNU OpenMP, which torch has on Linux, spin by default: where other programs run, they take the processor
    from the very thread that they wait for. It reads the environment once, when torch is imported.
    """
    if not {_SPINS, "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ[_SPINS] = "10000"  # as fast as the default where nothing else runs


def keep_freed_memory() -> None:
    """Lets GNU's C library keep up to 2 GiB that is freed, where the environment says nothing of it.

    By default it gives large tensors back to the system after each step, and asks for them again in the next, page by
    page, which on a CPU is up to a third of a step.
    """
    if sys.platform != "linux" or _OF_MALLOC & os.environ.keys():
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for parameter, size in _KEPT.items():
            library.mallopt(parameter, size)


@contextmanager
def without_collections() -> Iterator[None]:
    """Switches garbage collection off during imports: their objects stay, and collecting takes a fifth of the time.

    What they left is collected at the end, once. That takes a while, and runs finalizers, in which Python ignores what
    is raised: Ctrl-C waits for it.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            with _ctrl_c_afterwards():
                gc.collect(0)
                gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Holds a block that only imports, without collections; Ctrl-C and SIGTERM end the process in it at once.

    An exception may be lost: in a callback, where it is ignored, or in a package that catches what an import raises. A
    handler that a program has set by itself stays.
    """
    with ExitStack() as stack:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            stack.enter_context(signal_calls(signal.SIGINT, _end))
        if isinstance(signal.getsignal(signal.SIGTERM), _Stop):
            stack.enter_context(signal_calls(signal.SIGTERM, _end))
        stack.enter_context(without_collections())
        yield


@contextmanager
def stopping_at_sigterm() -> Iterator[None]:
    """Lets SIGTERM stop a block as an exception does, which removes temporary files and locks; a second one kills.

    A handler that a program has set by itself stays.
    """
    is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with signal_calls(signal.SIGTERM, _Stop()) if is_default else nullcontext():
        yield


class _Stop:
    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, number: int, _: Any) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != self.process:  # forked by a library, which ends it so
            signal.raise_signal(number)
        raise SystemExit(_told(number))


@contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    if not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    asked: list[int] = []
    with signal_calls(signal.SIGINT, lambda number, _: asked.append(number)):
        yield
    if asked:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def signal_calls(number: int, handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Calls a handler at a signal in place of the present one, in the main thread: no other one can set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end(number: int, _: Any) -> NoReturn:
    os._exit(_told(number))


def _told(number: int) -> int:
    """Says which signal ends the process, and returns the code of shells for it."""
    code, said = _ENDS[number]
    os.write(2, said)
    return code
