"""Metrics of classification."""

import pytest
import torch

from lora_plugins.tasks.classification.metrics import OccurringAUROC


@pytest.mark.parametrize("ignored", [None, 255])
def test_auroc_is_the_mean_over_the_classes_that_occur(ignored):
    shares, labels = torch.tensor([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.7, 0.3, 0.0]]), torch.tensor([0, 0, 1])
    metric = OccurringAUROC(num_classes=3, average="none", ignore_index=ignored)
    metric.update(shares, labels)
    if ignored is not None:
        metric.update(torch.tensor([[0.1, 0.9, 0.0]]), torch.tensor([ignored]))
    assert metric.compute() == 0.5
