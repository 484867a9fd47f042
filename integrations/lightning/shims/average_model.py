"""A use of `_average_model` of Lightning 2.6.6: the copy that WeightAveraging and StochasticWeightAveraging make.

Both keep it after `fit`, when the module has the average itself. Without this, a copy that is adapted stays beside a
module that is merged, and validation exchanges their tensors by position.
"""

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

Averaging = WeightAveraging | StochasticWeightAveraging


def drop_average(callback: Averaging) -> None:
    """Resets an averaging callback to its state before `fit`."""
    callback._average_model = None


def averaged_module(callback: Averaging) -> nn.Module | None:
    """Returns the copy of the module that an averaging callback has; None before training."""
    average: nn.Module | None = callback._average_model
    return average.module if isinstance(average, AveragedModel) else average
