"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_plugins.tasks.base import VisionTask
from lora_plugins.tasks.models import CLASSIFIERS, Source


class ImageClassificationTask(VisionTask):
    """One label an image, by any classifier of timm or transformers.

    Metrics: `accuracy` (share of images that are right) and `f1` (mean over the classes).
    Arguments and attributes are those of `VisionTask`.
    """

    sources: ClassVar[Mapping[str, Source]] = CLASSIFIERS
    main_metric: ClassVar[str] = "accuracy"

    def build_metrics(self) -> MetricCollection:
        """Accuracy over all images, and F1 averaged over classes."""
        shared: dict[str, Any] = {
            "num_classes": self.model_config.num_classes,
            "ignore_index": self.ignore_index,
            "validate_args": False,
        }
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **shared),
                "f1": MulticlassF1Score(average="macro", **shared),
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W) in [0, 1]."""
        return self.raw_logits(images)

    def logits_for(self, images: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes) for labels (N,)."""
        return self.raw_logits(images)
