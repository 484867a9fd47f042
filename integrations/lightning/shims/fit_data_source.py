"""A use of `FitLoop._data_source` of Lightning 2.6.6: the training batches before the training loop has set them up.

Without it, an init that learns from data cannot see the data of `fit`; data can still be given to `LoraModel`.
"""

from typing import Any

from lightning.pytorch import Trainer


def train_loaders(trainer: Trainer) -> Any:
    """Returns new training loaders, in whatever form the module or the data module gives them; None without data."""
    source = trainer.fit_loop._data_source
    return source.dataloader() if source.is_defined() else None
