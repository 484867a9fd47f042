"""Files that are whole or not there."""

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from filecmp import cmp
from functools import partial
from pathlib import Path
from stat import S_IMODE
from typing import BinaryIO, TypeVar
from zlib import crc32

import torch

T = TypeVar("T")

Content = bytes | Callable[[BinaryIO], object]
"""What a file is to hold: its bytes, or what writes them into it."""

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}")
"""The name of a temporary file or folder."""

_BEGINNING = 200
"""Bytes of a file's name that its temporary one has, as file systems take 255 in all."""

_DAY = 24 * 60 * 60.0
"""Seconds after which a temporary file is a left-over whoever wrote it."""


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that a process killed at any moment leaves the old one or the new one.

    What processes left that were killed on their way to this file is removed. The new one has the permissions of the
    old one. An error of a write has the name of the file that was to be written.
    """
    replace_files({path: data})


def replace_torch_file(path: Path, value: object) -> None:
    """Writes what `torch.save` writes, as `replace_file` does, and without a copy in memory."""
    replace_files({path: partial(_save, value)})


def replace_files(files: Mapping[Path, Content]) -> None:
    """Writes files that belong together so that a process killed at any moment leaves no mixture of old and new ones.

    While several of them are exchanged that are not what they were, the last one, without which nobody reads the
    others, is not there.

    Args:
        files: The contents by path, in one folder.
    """
    put_files(files)
    for path in files:
        _remove_leftovers_of(path)


def put_files(files: Mapping[Path, Content]) -> None:
    """Writes files as `replace_files` does, which looks through their folder for what killed processes left.

    For one of many files: after the last one, `remove_leftovers` looks for all of them.
    """
    temporary = {path: _temporary(path) for path in files}
    try:
        for path, content in files.items():
            _write(temporary[path], content, path)
        try:
            _exchange(temporary)
        except BaseException:
            if len(temporary) > 1:  # which may have begun, and Ctrl-C waits for its end
                _exchange(temporary)
            raise
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Makes a folder for what is to be moved to a path once it is whole, and removes it at the end of the block.

    What processes left that were killed on their way to this path is removed as well.
    """
    folder = _temporary(path)
    try:
        folder.mkdir(mode=0o700)  # as what is replaced may not be for everybody to read
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _remove_leftovers_of(path)


def take_permissions(old: Path, new: Path) -> None:
    """Gives a file the permissions of the one that it is to replace, if there is one."""
    with suppress(OSError):  # there is none, or the file system keeps no permissions
        new.chmod(S_IMODE(old.stat().st_mode))


def read_unmixed(last: Path, read: Callable[[], T]) -> T:
    """Reads what belongs together, and reads it again if another process has replaced it meanwhile.

    Args:
        last: The file that `replace_files` exchanges last.
        read: Reads everything; what it raises of files that are being replaced is passed over.
    """
    while True:
        before = _version(last)
        try:
            found = read()
        except Exception:
            if _version(last) == before:
                raise
        else:
            if _version(last) == before:
                return found


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:  # it is not there
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _exchange(temporary: Mapping[Path, Path]) -> None:
    """Puts temporary files in their places; those that are there already stay."""
    waiting = {path: file for path, file in temporary.items() if file.exists()}
    *_, last = temporary
    if len(temporary) > 1 and last in waiting and sum(not _is_same(path, file) for path, file in waiting.items()) > 1:
        last.unlink(missing_ok=True)
    for path, file in waiting.items():
        os.replace(file, path)


def _is_same(path: Path, file: Path) -> bool:
    try:
        return cmp(path, file, shallow=False)
    except OSError:  # there is none, or it cannot be read
        return False


def _temporary(path: Path) -> Path:
    return path.with_name(f".{_beginning(path)}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _beginning(path: Path) -> str:
    return os.fsencode(path.name)[:_BEGINNING].decode(errors="ignore")


def _save(value: object, file: BinaryIO) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from None  # such as a full disk, which torch tells as a wrong position in the file


def _write(temporary: Path, content: Content, path: Path) -> None:
    try:
        with temporary.open("xb") as file:
            take_permissions(path, temporary)  # ahead of the content, which not everybody may be allowed to read
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def _remove_leftovers_of(path: Path) -> None:
    remove_leftovers(path.parent, re.compile(re.escape(_beginning(path))))


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Removes the temporary files and folders of processes that were killed while they wrote into a folder.

    Those of a process that runs, which may be writing, and of another machine, of which one cannot know, are left for a
    day.

    Args:
        folder: The folder.
        names: Matches the names of the files that were to be written.
    """
    for path in folder.glob(".*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is not None and names.fullmatch(found["name"]) and _is_left_over(path, found):
            with suppress(OSError):  # another user's: what was to be written is written
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_left_over(path: Path, found: re.Match[str]) -> bool:
    if found["host"] == _host() and not _runs(int(found["process"])):
        return True
    try:
        return time.time() - path.stat().st_mtime > _DAY
    except FileNotFoundError:  # its process has finished it
        return False


def _host() -> str:
    return f"{crc32(socket.gethostname().encode()):08x}"


def _runs(process: int) -> bool:
    """Whether a process of this machine runs; True where one cannot ask."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
