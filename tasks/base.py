"""What classification and segmentation share: the network, one step for every stage, metrics, the optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from lora_plugins import ConfigError
from lora_plugins.tasks.data import Batch, VisionDataModule, check_targets
from lora_plugins.tasks.models import ModelConfig, Source, source_of
from lora_plugins.tasks.schedules import check_schedule, scheduler


class VisionTask(LightningModule):
    """A network trained with cross entropy, and its metrics over whole splits.

    Images are expected in [0, 1] and are normalised here, so that a task carries what its network expects. Metrics are
    logged as `train/NAME`, `val/NAME` and `test/NAME`, the loss as `train/loss` and so on.

    Without an optimizer from outside (the `optimizer:` of a YAML file), AdamW trains the parameters that require
    gradients when training starts.

    Args:
        model: Which network, with which weights.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: `constant`, or `cosine` down to nothing over the whole training.
        warmup: Share of all steps over which the learning rate rises, from 0 to below 1.
        ignore_index: The label that loss and metrics leave out.
        class_names: Names of the classes, for reports; by default their indices, or what the data module says.

    Attributes:
        network: The network.
        head_modules: Names, relative to the task, of the modules whose parameters are newly initialised. These have to
            be trained (and saved) whatever else stays frozen.

    Raises:
        ConfigError: For an unknown name anywhere, or numbers that do not go together.
    """

    sources: ClassVar[Mapping[str, Source]]
    main_metric: ClassVar[str]
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: ModelConfig,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "constant",
        warmup: float = 0.0,
        ignore_index: int = -100,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        # A checkpoint keeps arguments as plain types, so that it can be read without unpickling objects.
        model = ModelConfig(**model) if isinstance(model, Mapping) else model
        names = None if class_names is None else list(class_names)
        arguments = {"lr": lr, "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup}
        self.save_hyperparameters(
            {"model": asdict(model), **arguments, "ignore_index": ignore_index, "class_names": names}
        )
        check_schedule(schedule, warmup)
        if names is not None and len(names) != model.num_classes:
            raise ConfigError(f"{len(names)} class_names ({', '.join(names)}) for num_classes={model.num_classes}.")
        self.model_config, self.class_names = model, names
        self.lr, self.weight_decay, self.schedule, self.warmup = lr, weight_decay, schedule, warmup
        self.ignore_index = ignore_index
        self._build(model)
        metrics = self.build_metrics()
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def _build(self, model: ModelConfig) -> None:
        source = source_of(model, self.sources)
        built = source.build(model)
        mean, std = model.mean or built.mean, model.std or built.std
        if mean is None or std is None:
            raise ConfigError(
                f"The {model.source} model {model.name!r} does not say which mean and std its images should have: "
                "set `mean` and `std` of the model."
            )
        self.network, self._network_logits = built.module, source.logits
        self.head_modules = tuple(f"network.{name}" for name in built.new_modules)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @abstractmethod
    def build_metrics(self) -> MetricCollection:
        """The metrics of one split, updated with predicted and true labels, or with logits where they say so."""

    def raw_logits(self, images: Tensor) -> Tensor:
        """Normalise images (N, channels, H, W) in [0, 1] and give what the network says of them."""
        return self._network_logits(self.network, (images - self.mean) / self.std)

    @abstractmethod
    def logits_for(self, images: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes, ...) laid out like the targets (N, ...)."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the labels that count; zero, not undefined, where none does."""
        count = (targets != self.ignore_index).sum().clamp(min=1)
        return cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum") / count

    def setup(self, stage: str) -> None:
        """Check that data and model agree on the classes, and take over the names of the classes.

        Raises:
            ConfigError: Where they do not agree.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, VisionDataModule):
            return
        names = data.class_names
        if len(names) != self.model_config.num_classes:
            raise ConfigError(
                f"The data has {len(names)} classes ({', '.join(names)}), the model num_classes="
                f"{self.model_config.num_classes}. Set `model.num_classes` to {len(names)}."
            )
        if data.ignore_index not in (None, self.ignore_index):
            raise ConfigError(
                f"The data has ignore_index={data.ignore_index}, the task {self.ignore_index}: labels that the data "
                f"does not count would be trained on. Set `ignore_index` of the task to {data.ignore_index}."
            )
        self.class_names = self.class_names or names

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._step(batch, "train", self.train_metrics)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch in the metrics of the val split."""
        self._step(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch in the metrics of the test split."""
        self._step(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predicted label of each image (N,), or of each of its pixels (N, H, W)."""
        logits: Tensor = self(Batch.read(batch).images)
        return logits.argmax(1)

    def on_train_epoch_end(self) -> None:
        """Log the metrics over all batches of the epoch, and start afresh."""
        self._log(self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over the whole val split, and start afresh."""
        self._log(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics over the whole test split, and start afresh."""
        self._log(self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the parameters that require gradients, with the schedule that was asked for."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler(optimizer, self.schedule, total, self.warmup),
                "interval": "step",
            },
        }

    def _step(self, batch: Any, stage: str, metrics: MetricCollection) -> Tensor:
        read = Batch.read(batch)
        targets = check_targets(read, self.model_config.num_classes, self.ignore_index).long()
        logits = self.logits_for(read.images, targets)
        loss = self.loss(logits, targets)
        metrics.update(logits.detach().argmax(1), targets)
        self.log(f"{stage}/loss", loss, batch_size=len(targets), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def _log(self, metrics: MetricCollection) -> None:
        shown = f"{metrics.prefix}{self.main_metric}"
        for name, value in metrics.compute().items():
            for label, number in self._by_class(name, value).items():
                self.log(label, number, prog_bar=label == shown)
        metrics.reset()

    def _by_class(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A metric as single numbers: one, or one a class under the name of the class."""
        if value.ndim == 0:
            return {name: value}
        classes = self.class_names or [str(i) for i in range(len(value))]
        return {f"{name}/{label}": number for label, number in zip(classes, value, strict=True)}
