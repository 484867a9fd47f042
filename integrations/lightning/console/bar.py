"""One line of a terminal that shows progress; what is printed meanwhile appears above it."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

SECONDS = 0.1
"""Between two pictures of the bar. No thread draws it: a fork of a process with threads can hang."""


Step = TypeVar("Step")


class Bar:
    """A progress bar of one line, whose last picture stays as a line if asked.

    The display is stopped once and for all: nothing that is printed afterwards is drawn over. Lines of `logging` that
    go to the terminal go above the bar as well.
    """

    def __init__(self, *, stays: bool = True) -> None:
        one_line = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", table_column=one_line),
            BarColumn(bar_width=None),
            TaskProgressColumn(table_column=one_line),
            TextColumn("{task.fields[left]}", table_column=one_line),
            TextColumn("{task.fields[metric]}", table_column=one_line, markup=False),
            console=Console(),
            auto_refresh=False,
            expand=True,
            transient=not stays,
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),  # what goes to a file stays there
        )
        self._task = self._progress.add_task("", total=None, left="", metric="")
        self._drawn = 0.0
        self._streams = _logging_through_streams()
        self._progress.start()
        self._streams.__enter__()

    def show(self, text: str, done: float, total: float | None, left: str, metric: str, *, now: bool) -> None:
        """Shows a state; if not `now`, at most ten times a second."""
        self._progress.update(self._task, description=text, completed=done, total=total, left=left, metric=metric)
        if now or time.monotonic() - self._drawn >= SECONDS:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def stop(self) -> None:
        """Ends the display."""
        self._streams.__exit__(None, None, None)
        self._progress.stop()


def followed(steps: Iterable[Step], text: str, total: int) -> Iterator[Step]:
    """Yields steps; the first process shows how many of them are done, if its output is a terminal."""
    if (bar := _passing_bar()) is None:
        yield from steps
        return
    try:
        for done, step in enumerate(steps, 1):
            yield step
            bar.show(text, done, total, f"{done}/{total}", "", now=done == total)
    finally:
        bar.stop()


@rank_zero_only
def _passing_bar() -> Bar | None:
    return Bar(stays=False) if is_terminal() else None


def is_terminal() -> bool:
    """Whether the output is a terminal whose lines can be drawn over: no file, no pipe."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None where a process starts without one
    return terminal and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


@contextmanager
def _logging_through_streams() -> Iterator[None]:
    """Lets handlers of `logging` that hold one of the first streams write to its present replacement."""
    known = [logging.root, *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in known for handler in getattr(logger, "handlers", ())]
    replaced = [
        (handler, handler.stream)
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stderr__, sys.__stdout__)
    ]
    for handler, _ in replaced:
        handler.setStream(sys.stdout if handler.stream is sys.__stdout__ else sys.stderr)
    try:
        yield
    finally:
        for handler, stream in replaced:
            handler.setStream(stream)
