"""The process that writes the files of a run, and what all processes refuse together with it."""

from collections.abc import Callable

from lightning.pytorch import Trainer

from lora_plugins import LoraError
from lora_plugins.integrations.lightning.shims import is_fast_dev_run


def writes_files(trainer: Trainer) -> bool:
    """Returns whether this process writes the files of a run."""
    return trainer.is_global_zero and not is_fast_dev_run(trainer)


def check_by_writer(trainer: Trainer, check: Callable[[], None]) -> None:
    """Makes a check in the process that writes the files of a run; what it raises, all processes raise.

    One that is refused alone leaves the others waiting for it. All processes have to call this together.
    """
    error = None
    if writes_files(trainer):
        try:
            check()
        except LoraError as refused:
            error = refused
    error = trainer.strategy.broadcast(error)
    if error is not None:
        raise error
