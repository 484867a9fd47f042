"""Checks before training that its results can be written afterwards."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_plugins.errors import ConfigError

MEBIBYTE = 2**20


def from_home(path: str | Path) -> str:
    """Returns a path with a leading `~` read as the home, as Lightning does where it is given one.

    No shell does it for what a YAML file says, nor in `--out=~/run`, and results would be left in a folder called `~`.
    """
    return os.path.expanduser(path)  # pathlib's refuses the home of a user that there is not


def check_writable_file(path: Path, setting: str) -> None:
    """Checks that a file, which a setting names, can be written, and makes nothing.

    Raises:
        ConfigError: If it cannot.
    """
    with _looking_at(path, setting):
        if path.is_dir():
            raise ConfigError(f"{setting} is {path}, which is a folder. Name a file.")
        _check_place(path, path.parent, setting)


def check_writable_place(path: Path, setting: str) -> None:
    """As `check_writable_file`, for what may be a file or a folder."""
    with _looking_at(path, setting):
        _check_place(path, path.parent, setting)


def check_writable_folder(path: Path, setting: str) -> None:
    """As `check_writable_file`, for a folder that may be there or not."""
    with _looking_at(path, setting):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{setting} is {path}, which is a file. Name a folder.")
        _check_place(path, path, setting)


def check_space(path: Path, needed: int, setting: str) -> None:
    """Checks that there is room for a file or a folder of so many bytes, which a setting names.

    Raises:
        ConfigError: If there is less on that disk.
    """
    with _looking_at(path, setting):
        free = shutil.disk_usage(_existing(path)).free
    if free < needed:
        raise ConfigError(
            f"{setting} is {path}, which takes {needed / MEBIBYTE:,.1f} MiB, and that disk has {free / MEBIBYTE:,.1f} "
            "MiB left. Make room, or name a place on another disk."
        )


@contextmanager
def _looking_at(path: Path, setting: str) -> Iterator[None]:
    """Names the place that the system refuses to look at, such as one below a folder of somebody else."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{setting} is {path}, which cannot be reached: {error.strerror or error}. Name another place."
        ) from error


def _check_place(path: Path, folder: Path, setting: str) -> None:
    for link in (folder, *folder.parents):
        if link.is_symlink() and not link.exists():
            raise ConfigError(
                f"{setting} is {path}, and {link} is a link to {link.readlink()}, which is not there. Make that folder "
                "first, or name another place."
            )
    existing = _existing(folder)
    if not existing.is_dir():
        raise ConfigError(f"{setting} is {path}, and {existing} is a file. Name another place.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{setting} is {path}, and nothing can be written in {existing}: {error.strerror or error}. Name another "
            "place."
        ) from error


def _existing(path: Path) -> Path:
    """Returns the path itself, or its innermost parent that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())
