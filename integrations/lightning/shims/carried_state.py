"""A use of `Trainer.state` of Lightning 2.6.6, which comes back from processes that multiprocessing starts.

Nothing else of a callback does: `ddp_spawn`, `ddp_fork` and `ddp_notebook` bring back weights, the path of the best
checkpoint, metrics, and this object. Without it, no merge could be taken back after them, and their checkpoints would
belong to another base.
"""

from lightning.pytorch import Trainer

_ATTRIBUTE = "lora_merges"


def carry(trainer: Trainer, key: str, data: bytes) -> None:
    """Sends bytes under a key to the trainer of the calling process, if that started this one."""
    vars(trainer.state).setdefault(_ATTRIBUTE, {})[key] = data


def carried(trainer: Trainer, key: str) -> bytes | None:
    """Returns what was sent under a key; None if nothing was."""
    found: bytes | None = vars(trainer.state).get(_ATTRIBUTE, {}).get(key)
    return found
