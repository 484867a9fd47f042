"""A terminal for a process: what it draws, as a person sees it in the end, scrolled-off lines included."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from dataclasses import dataclass

import pyte

ROWS = 24
CTRL_C = b"\x03"


@dataclass(frozen=True)
class Seen:
    """What was on the terminal when the process had ended.

    Attributes:
        lines: The lines, without blanks at their ends.
        code: The exit code.
        cursor: Whether the cursor is shown.
        waited: Seconds from the last Ctrl-C to the end.
    """

    lines: list[str]
    code: int
    cursor: bool
    waited: float


def run(command, columns, press_after="", times=1, environment=None):
    """Runs a command on a terminal; presses Ctrl-C so many times from a moment after a text is on it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    with subprocess.Popen(
        command,
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **(environment or {})},
        preexec_fn=_take_terminal,  # noqa: PLW1509  # it calls two functions of the kernel
    ) as process:
        os.close(its)
        screen = pyte.HistoryScreen(columns, ROWS, history=10_000)
        stream, pressed, seen = pyte.ByteStream(screen), 0, b""
        at = float("inf")
        for piece in _pieces(ours):
            stream.feed(piece)
            seen += piece
            if at == float("inf") and press_after.encode() in seen:
                at = time.monotonic()
            if press_after and pressed < times and time.monotonic() - at > 0.3:
                os.write(ours, CTRL_C)
                pressed, at = pressed + 1, time.monotonic()
    above = ["".join(row[column].data for column in range(columns)) for row in screen.history.top]
    lines = [line.rstrip() for line in [*above, *screen.display]]
    return Seen(lines, process.returncode, not screen.cursor.hidden, time.monotonic() - at)


def _take_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _pieces(descriptor):
    """Yields what comes, and nothing now and then where nothing comes: a process that sleeps prints no line."""
    while True:
        if not select.select([descriptor], [], [], 0.1)[0]:
            yield b""
            continue
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        yield piece
    os.close(descriptor)
