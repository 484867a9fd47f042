"""A use of `_average_model` of Lightning 2.6.6: the copy that WeightAveraging and StochasticWeightAveraging make.

Both keep it after `fit`, when the module has the average itself. Without this, a copy that is adapted stays beside a
module that is merged, and validation exchanges their tensors by position.
"""

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

Averaging = WeightAveraging | StochasticWeightAveraging


def drop_average(callback: Averaging, module: LightningModule) -> None:
    """Takes the copy from an averaging callback.

    StochasticWeightAveraging writes the state of its copy into each checkpoint, and cannot read one that has none: the
    module takes the place of the copy.
    """
    callback._average_model = module if isinstance(callback, StochasticWeightAveraging) else None


def averaged_module(callback: Averaging) -> nn.Module | None:
    """Returns the copy of the module that an averaging callback has; None before training."""
    average: nn.Module | None = callback._average_model
    return average.module if isinstance(average, AveragedModel) else average
