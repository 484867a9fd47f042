"""Metrics of classification."""

import warnings

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.utilities.data import dim_zero_cat


class OccurringAUROC(MulticlassAUROC):
    """One-versus-rest AUROC, mean over the classes with both positive and negative samples.

    torchmetrics warns about the other classes, and counts them as 0.
    """

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics' own AUROC returns a Tensor, and has this too
        """The mean; nan if there is no such class."""
        labels = self._labels()
        if not len(labels):  # of which torchmetrics makes an IndexError
            return labels.new_tensor(torch.nan, dtype=torch.float)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No (positive|negative) samples")
            values: Tensor = super().compute()
        counts = labels.bincount(minlength=len(values))
        return values[(counts > 0) & (counts < len(labels))].mean()

    def _labels(self) -> Tensor:
        labels: Tensor = dim_zero_cat(self.target)
        return labels if self.ignore_index is None else labels[labels != self.ignore_index]
