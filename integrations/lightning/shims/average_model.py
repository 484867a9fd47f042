"""A use of `_average_model` of Lightning 2.6.6: the copy that WeightAveraging and StochasticWeightAveraging make.

Both keep it after `fit`, when the module has the average itself. Without this, a copy that is adapted stays beside a
module that is merged, and validation exchanges their tensors by position.
"""

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

Averaging = WeightAveraging | StochasticWeightAveraging


def drop_average(callback: Averaging) -> None:
    """Makes an averaging callback what it is before `fit`."""
    callback._average_model = None
