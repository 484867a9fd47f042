"""Semantic segmentation."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from lora_plugins.tasks.models import SEGMENTERS, Source
from lora_plugins.tasks.segmentation.metrics import ClassIoU
from lora_plugins.tasks.training import CONFUSION, CROSS_ENTROPY, SMP_LOSSES, VisionTask


class SemanticSegmentationTask(VisionTask):
    """One label per pixel: segmenters of transformers and torchvision, decoders of segmentation-models-pytorch.

    Metrics, all from counts over the whole split: `mean_iou` (intersection over union, mean over the classes that
    occur in masks or predictions), `iou/NAME` for each class, `dice` (mean over the same classes) and `pixel_accuracy`.
    Logits at another resolution, such as SegFormer's, are resized to that of the mask.
    Arguments and attributes are those of `VisionTask`; losses are `cross_entropy`, `focal`, `dice`, `lovasz` and sums.
    """

    sources: ClassVar[Mapping[str, Source]] = SEGMENTERS
    losses: ClassVar[Sequence[str]] = (CROSS_ENTROPY, *SMP_LOSSES)
    main_metric: ClassVar[str] = "mean_iou"

    def build_metrics(self) -> MetricCollection:
        """All metrics, from the predicted labels."""
        shared = self.metric_options
        metrics: dict[str, Metric | MetricCollection] = {
            "mean_iou": MulticlassJaccardIndex(average="macro", **shared),
            "iou": ClassIoU(self.model_config.num_classes, self.ignore_index),
            # F1 over all pixels of a split is their Dice coefficient.
            "dice": MulticlassF1Score(average="macro", **shared),
            "pixel_accuracy": MulticlassAccuracy(average="micro", **shared),
            CONFUSION: MulticlassConfusionMatrix(**shared),
        }
        # Named, as torchmetrics would find them by the values of the first batch, which can be equal by chance.
        return MetricCollection(metrics, compute_groups=[["mean_iou", "iou", CONFUSION], ["dice"], ["pixel_accuracy"]])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of images (N, channels, H, W) in [0, 1]."""
        return self.logits_at(images, images.shape[-2:])

    def logits_for(self, images: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes, H, W) for masks (N, H, W)."""
        return self.logits_at(images, targets.shape[-2:])

    def logits_at(self, images: Tensor, size: torch.Size) -> Tensor:
        """Logits (N, classes, *size), resized if the network's are of another size."""
        logits = self.raw_logits(images)
        if logits.shape[-2:] == size:
            return logits
        return interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
