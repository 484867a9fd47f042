"""A metric of classification that is defined for splits without some of the classes."""

from __future__ import annotations

import warnings

from torch import Tensor
from torchmetrics.classification import MulticlassAUROC


class OccurringAUROC(MulticlassAUROC):
    """Area under the curve of each class against the others, mean over the classes that have both.

    torchmetrics warns about classes without positive or without negative samples, and counts them as 0.
    """

    def compute(self) -> Tensor:
        """The mean, or nan where no class has both."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No (positive|negative) samples")
            values: Tensor = super().compute()
        labels = self._labels()
        both = [bool((labels == i).any() and (labels != i).any()) for i in range(len(values))]
        return values[values.new_tensor(both).bool()].mean()

    def _labels(self) -> Tensor:
        from torchmetrics.utilities.data import dim_zero_cat

        labels: Tensor = dim_zero_cat(self.target)
        return labels[labels != self.ignore_index]
