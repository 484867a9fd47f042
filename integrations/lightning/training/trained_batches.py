"""Whether a fit has trained at all: results of one that has not are not written."""

from lightning.pytorch import Trainer

from lora_plugins import StateError

_NO_DATA = (
    "Nothing was trained: the data for training holds not one batch. No file is written. Look at the data, and at a "
    "batch_size that is larger than they are, of which drop_last leaves nothing then."
)

_STOPPED_EARLY = (
    "Nothing was trained: the run was told to stop before its first batch, by max_time, a signal or a callback. No "
    "file is written. Give it more time, or look at what sets trainer.should_stop."
)


def check_trained(trainer: Trainer) -> None:
    """Checks that a fit has trained on a batch, or that a limit of the trainer asked for none.

    Raises:
        StateError: If neither is so.
    """
    none_wanted = 0 in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches)
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready  # those before a resumed run, too
    if not batches and not none_wanted:
        raise StateError(_STOPPED_EARLY if trainer.should_stop else _NO_DATA)
