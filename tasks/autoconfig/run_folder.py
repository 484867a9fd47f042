"""The folder for the results of a run: the one that is named, or a new one; used by one run at a time."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from lora_plugins.errors import ConfigError, listing
from lora_plugins.integrations.lightning.cli import try_lock, unlock
from lora_plugins.tasks.autoconfig.configuration import ADAPTER, CONFIG, MERGED, PICTURE, REPORT
from lora_plugins.writable import check_writable_folder

RUNS = Path("runs")

LOCK = ".lock"
"""A file in the folder that is locked while a run goes on there, and gone when it has ended."""

LEFT = frozenset({ADAPTER, MERGED, REPORT, "report.json", PICTURE, CONFIG, "logs"})
"""What runs leave in their folder, beside hidden files of those that were killed."""


def folders(out: Path | None, data: Path | None) -> Iterator[Path]:
    """Returns the folders that a run may use, of which it takes the first free one.

    `out` is the one that was named; `data` is None for the images that come along.

    Raises:
        ConfigError: If it was named, and has results, or something else, or is inside of the data.
    """
    if out is not None:
        return iter([_checked(out, data)])
    name = "digits" if data is None else data.name if data.is_dir() else data.stem
    name = re.sub("[$%]", "_", name) if _is_expanded(name) else name
    # Inside of a folder of data, runs would count as data the next time.
    runs = RUNS if data is None or not RUNS.resolve().is_relative_to(data) else data.parent / RUNS
    tried = (runs / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return (path for path in tried if not _has_results(path))


@contextmanager
def held(tried: Iterable[Path]) -> Iterator[Path]:
    """Yields the first folder that no other run uses, and keeps others out for the duration of the block.

    Raises:
        ConfigError: If there is none, or it cannot be made, or a logger would take its name for another one.
    """
    for path in tried:
        if _is_expanded(path):
            raise ConfigError(
                f"{path} holds what the log takes for a variable of the shell, which is set: it would be written into "
                f"{os.path.expandvars(path)}. Name another place: --out DIR."
            )
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        lock = _locked(path)
        if lock is not None:
            break
    else:
        raise ConfigError(f"--out is {path}, where another run is going on. Name a new folder.")
    try:
        yield path
    finally:
        unlock(lock, made)


def _locked(path: Path) -> FileLock | None:
    """Locks a folder, which is made if it does not exist; None if another run uses it, or has just used it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}. Name another place: --out DIR."
        ) from error
    lock = try_lock(path / LOCK)
    if lock is not None and _has_results(path):
        lock.release()
        return None
    return lock


def _checked(out: Path, data: Path | None) -> Path:
    check_writable_folder(out, "--out")
    if _has_results(out):
        raise ConfigError(f"--out is {out}, and there are results already. Name a new folder.")
    names = [each.name for each in out.iterdir()] if out.exists() else []
    others = [name for name in names if name not in LEFT and not name.startswith(".")]
    if others:
        raise ConfigError(
            f"--out is {out}, which holds something else: {listing(sorted(others), 3)}. Name a new folder."
        )
    if data is not None and out.resolve().is_relative_to(data):
        raise ConfigError(
            f"--out is {out}, inside of DATA, and would count as data the next time. Name another folder."
        )
    return out


def _is_expanded(path: str | Path) -> bool:
    """Whether the log would lie elsewhere: TensorBoard's logger takes `$NAME` for a variable of the shell."""
    return os.path.expandvars(path) != str(path)


def _has_results(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ADAPTER, MERGED))
