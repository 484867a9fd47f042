"""Runs that a hook starts inside `fit`, such as a test when training ends, as luxonis-train does.

A Trainer of Lightning 2.6.6 has one state, which says `test` from then on, and `fit` goes by it: it would leave
`on_fit_end` out, where adapters are saved and merged.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

_FITS = "_lora_plugins_fits"
"""Attribute of a trainer whose `fit` has not come to its end; a module may make a new callback for each run."""


def begin_run(trainer: Trainer, stage: str) -> None:
    """Records that a run begins."""
    if stage == "fit":
        setattr(trainer, _FITS, True)


def end_run(trainer: Trainer, stage: str) -> None:
    """Records that a run has ended; after one inside of `fit`, the trainer continues with that."""
    if stage == "fit":
        vars(trainer).pop(_FITS, None)
    elif hasattr(trainer, _FITS):
        trainer.state.fn = TrainerFn.FITTING
