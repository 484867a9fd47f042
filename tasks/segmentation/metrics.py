"""Metrics of segmentation."""

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex


class ClassIoU(MulticlassJaccardIndex):
    """Intersection over union of each class; nan for a class that never occurs."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__(num_classes, average="none", ignore_index=ignore_index, validate_args=False)

    def compute(self) -> Tensor:
        """The values, (classes,)."""
        occurs = self.confmat.sum(0) + self.confmat.sum(1) > 0
        return torch.where(occurs, super().compute(), torch.nan)
