"""Image classification."""

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
from lora_plugins.field_checks import check_fields, number_from
from lora_plugins.tasks.classification.metrics import OccurringAUROC
from lora_plugins.tasks.models import CLASSIFIERS, ModelConfig, Source
from lora_plugins.tasks.training import CONFUSION, CROSS_ENTROPY, VisionTask

TOP = 5


class ImageClassificationTask(VisionTask):
    """One label per image: classifiers of timm and transformers.

    Metrics: `accuracy` (micro), `top5` (for more than five classes), `f1` and `auroc` (one versus rest, mean over the
    classes that occur; for `f1`, in labels or predictions), and `calibration_error` (expected, 15 bins).

    Args:
        model: Which network, with which weights.
        mixup: Alpha of mixup (arXiv 1710.09412) on training batches; 0 for none.
        cutmix: Alpha of cutmix (arXiv 1905.04899), likewise. With both, each batch gets one of them at random.
        **options: The other arguments of `VisionTask`. Losses are `cross_entropy` and `focal`.

    Raises:
        ConfigError: As `VisionTask`, or if the loss does not take soft targets.
    """

    sources: ClassVar[Mapping[str, Source]] = CLASSIFIERS
    losses: ClassVar[Sequence[str]] = (CROSS_ENTROPY, "focal")
    main_metric: ClassVar[str] = "accuracy"

    def __init__(self, model: ModelConfig, *, mixup: float = 0.0, cutmix: float = 0.0, **options: Any) -> None:
        super().__init__(model, **options)
        self.save_hyperparameters({"mixup": mixup, "cutmix": cutmix})
        check_fields({"mixup": mixup, "cutmix": cutmix}, dict.fromkeys(("mixup", "cutmix"), number_from(0)))
        if (mixup or cutmix) and not self.objective.takes_soft_targets:
            raise ConfigError("mixup and cutmix make soft targets of two classes, which only cross_entropy takes.")
        classes = self.model_config.num_classes
        mixers: list[Any] = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
        mixers += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
        self._mixer: Any = v2.RandomChoice(mixers) if mixers else None

    def build_metrics(self) -> MetricCollection:
        """All metrics, from probabilities."""
        shared = self.metric_options
        metrics: dict[str, Metric | MetricCollection] = {
            **self._cheap_metrics(),
            "auroc": OccurringAUROC(average="none", **shared),
            "calibration_error": MulticlassCalibrationError(**shared),
            CONFUSION: MulticlassConfusionMatrix(**shared),
        }
        return MetricCollection(metrics, compute_groups=False)  # groups are found by the values of the first batch

    def build_train_metrics(self) -> MetricCollection:
        """Accuracy and F1: the metrics that do not store all predictions."""
        return MetricCollection(self._cheap_metrics(), compute_groups=False)

    def preds(self, logits: Tensor) -> Tensor:
        """The probabilities (N, classes)."""
        return logits.float().softmax(1)

    def mixup(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images and soft targets after mixup or cutmix; unchanged without either, or if a label is ignored."""
        if self._mixer is None or (targets == self.ignore_index).any():
            return images, targets
        mixed_images, soft_targets = self._mixer(images, targets)
        return mixed_images, soft_targets

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W) in [0, 1]."""
        return self.raw_logits(images)

    def logits_for(self, images: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes) for labels (N,)."""
        return self.raw_logits(images)

    def _cheap_metrics(self) -> dict[str, Metric | MetricCollection]:
        shared = self.metric_options
        top = {"top5": MulticlassAccuracy(average="micro", top_k=TOP, **shared)} if shared["num_classes"] > TOP else {}
        return {
            "accuracy": MulticlassAccuracy(average="micro", **shared),
            **top,
            "f1": MulticlassF1Score(average="macro", **shared),
        }
