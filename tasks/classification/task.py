"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchvision.transforms import v2

from lora_plugins import ConfigError
from lora_plugins.tasks.classification.metrics import OccurringAUROC
from lora_plugins.tasks.models import CLASSIFIERS, ModelConfig, Source
from lora_plugins.tasks.training import CONFUSION, CROSS_ENTROPY, VisionTask

TOP = 5


class ImageClassificationTask(VisionTask):
    """One label an image, by any classifier of timm or transformers.

    Metrics: `accuracy` (share of images that are right), `top5` (for more than five classes), `f1` and `auroc` (each
    class against the others, mean over the classes that occur; for `f1`, being predicted is enough), and
    `calibration_error` (expected, 15 bins).

    Args:
        model: Which network, with which weights.
        mixup: Strength alpha of mixup (arXiv 1710.09412) on training batches; 0 for none.
        cutmix: Strength alpha of cutmix (arXiv 1905.04899), likewise. With both, each batch gets one of them.
        **options: The other arguments of `VisionTask`. Losses are `cross_entropy` and `focal`.

    Raises:
        ConfigError: As `VisionTask`, or where the loss cannot be taken of mixed labels.
    """

    sources: ClassVar[Mapping[str, Source]] = CLASSIFIERS
    losses: ClassVar[Sequence[str]] = (CROSS_ENTROPY, "focal")
    main_metric: ClassVar[str] = "accuracy"

    def __init__(self, model: ModelConfig, *, mixup: float = 0.0, cutmix: float = 0.0, **options: Any) -> None:
        super().__init__(model, **options)
        self.save_hyperparameters({"mixup": mixup, "cutmix": cutmix})
        if min(mixup, cutmix) < 0:
            raise ConfigError(f"mixup is {mixup} and cutmix {cutmix}; both are at least 0.")
        if (mixup or cutmix) and not self.objective.takes_shares:
            raise ConfigError("mixup and cutmix give each image shares of two classes, which only cross_entropy takes.")
        classes = self.model_config.num_classes
        mixers: list[Any] = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
        mixers += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
        self._mix = v2.RandomChoice(mixers) if mixers else None

    def build_metrics(self) -> MetricCollection:
        """All of them, from the probabilities."""
        classes = self.model_config.num_classes
        shared: dict[str, Any] = {"num_classes": classes, "ignore_index": self.ignore_index, "validate_args": False}
        metrics: dict[str, Metric | MetricCollection] = {
            **self._light(shared),
            "auroc": OccurringAUROC(average="none", **shared),
            "calibration_error": MulticlassCalibrationError(**shared),
            CONFUSION: MulticlassConfusionMatrix(**shared),
        }
        return MetricCollection(metrics)

    def build_train_metrics(self) -> MetricCollection:
        """Accuracy and F1: those that keep no list of all predictions."""
        classes = self.model_config.num_classes
        shared: dict[str, Any] = {"num_classes": classes, "ignore_index": self.ignore_index, "validate_args": False}
        return MetricCollection(self._light(shared))

    def judged(self, logits: Tensor) -> Tensor:
        """The probabilities (N, classes)."""
        return logits.float().softmax(1)

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images and shares of classes after mixup or cutmix, where they are asked for."""
        if self._mix is None or (targets == self.ignore_index).any():
            return images, targets
        mixed: tuple[Tensor, Tensor] = self._mix(images, targets)
        return mixed

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W) in [0, 1]."""
        return self.raw_logits(images)

    def logits_for(self, images: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes) for labels (N,)."""
        return self.raw_logits(images)

    def _light(self, shared: dict[str, Any]) -> dict[str, Metric | MetricCollection]:
        top = {"top5": MulticlassAccuracy(average="micro", top_k=TOP, **shared)} if shared["num_classes"] > TOP else {}
        return {
            "accuracy": MulticlassAccuracy(average="micro", **shared),
            **top,
            "f1": MulticlassF1Score(average="macro", **shared),
        }
