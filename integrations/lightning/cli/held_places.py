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
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another run is going on that will write {place}, and the later of the two would replace the other's "
            "results. Name another place, or wait for its end."
        ) from error
    except (OSError, NotImplementedError):  # the latter on a disk without locks
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()
            with suppress(OSError):
                file.unlink()
                for folder in made:
                    folder.rmdir()  # where nothing was left
