"""A use of `Trainer.state` of Lightning 2.6.6, which comes back from processes that multiprocessing starts.

Nothing else of a callback does: `ddp_spawn`, `ddp_fork` and `ddp_notebook` bring back weights, the path of the best
checkpoint, metrics, and this object. Without it, no merge could be taken back after them, and their checkpoints would
belong to another base.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer

_ATTRIBUTE = "lora_merges"


def carry(trainer: Trainer, key: str, data: bytes) -> None:
    """Sends bytes under a key to the trainer of the calling process, if that started this one."""
    vars(trainer.state).setdefault(_ATTRIBUTE, {})[key] = _InAFile(data)


def carried(trainer: Trainer, key: str) -> bytes | None:
    """Returns what was sent under a key; None if nothing was."""
    found: bytes | None = vars(trainer.state).get(_ATTRIBUTE, {}).get(key)
    return found


class _InAFile(bytes):
    """Bytes that travel in a temporary file.

    Lightning reads the queue from a process after that has ended, and one that has put more into it than a pipe holds,
    64 KiB in Linux, waits for a reader without end.
    """

    def __reduce__(self) -> tuple[Callable[[str], bytes], tuple[str]]:
        handle, path = tempfile.mkstemp(prefix="lora_plugins-")
        with os.fdopen(handle, "wb") as file:
            file.write(self)
        return _received, (path,)


def _received(path: str) -> bytes:
    data = Path(path).read_bytes()
    os.unlink(path)
    return _InAFile(data)
