"""Places of results, used by one run at a time: the later of two would replace what the other has trained."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lora_plugins import ConfigError


@contextmanager
def held(places: Iterable[str]) -> Iterator[None]:
    """Keeps other runs from the places for the duration of the block; files that are locked beside them say so.

    Where no file can be beside a place, as at a volume that is mounted, others are not kept from it. Whether it can be
    written itself, and is that of one result only, is for the callback to say.

    Raises:
        ConfigError: If another run has one of them.
    """
    with ExitStack() as stack:
        for place in dict.fromkeys(map(os.path.abspath, places)):
            stack.enter_context(_held(Path(place)))
        yield


@contextmanager
def _held(place: Path) -> Iterator[None]:
    file = place.parent / f".{place.name}.lock"
    made = [folder for folder in file.parents if not folder.exists()]
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    lock = try_lock(file)
    if lock is None:
        raise ConfigError(
            f"Another run is going on that will write {place}, and the later of the two would replace the other's "
            "results. Name another place, or wait for its end."
        )
    try:
        yield
    finally:
        unlock(lock, made)


def try_lock(file: Path) -> FileLock | None:
    """Locks a file without waiting; None if another run has locked it.

    On a disk without locks, and where the file cannot be made, nobody is kept out.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except NotImplementedError:  # on a disk without locks, where the file is there and nobody's
        with suppress(OSError):
            file.unlink()
    except OSError:
        pass
    return lock


def unlock(lock: FileLock, made: Iterable[Path]) -> None:
    """Releases a lock, and removes its file, and the folders made for it, innermost first, where nothing is in them."""
    is_ours = lock.is_locked  # else another user's run may hold it
    lock.release()
    with suppress(OSError):
        if is_ours:
            Path(lock.lock_file).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
