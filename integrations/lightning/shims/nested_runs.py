"""Runs that a hook starts inside `fit`, such as a test when training ends, as luxonis-train does.

A Trainer of Lightning 2.6.6 has one state, which says `test` from then on, and `fit` goes by it: it would leave
`on_fit_end` out, where adapters are saved and merged.
"""

from weakref import WeakSet

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

_FITTING: "WeakSet[Trainer]" = WeakSet()
"""Trainers whose `fit` has not come to its end."""


def begin_run(trainer: Trainer, stage: str) -> bool:
    """Takes note of a run that begins; returns whether it is inside the `fit` of its trainer."""
    if stage == "fit":
        _FITTING.add(trainer)
        return False
    return trainer in _FITTING


def end_run(trainer: Trainer, *, nested: bool) -> None:
    """Takes note of a run that has ended; after one inside of `fit`, the trainer goes on with that."""
    if nested:
        trainer.state.fn = TrainerFn.FITTING
    else:
        _FITTING.discard(trainer)
