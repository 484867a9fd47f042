"""A use of `_MultiProcessingLauncher` of Lightning 2.6.6, the one sign of `ddp_spawn`, `ddp_fork` and `ddp_notebook`.

Without it, no warning says that the adapter stays in the other processes.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def starts_by_multiprocessing(trainer: Trainer) -> bool:
    """Whether `fit` runs in processes that multiprocessing starts, and not in this one."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
