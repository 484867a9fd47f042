"""The base of all tasks: the network, one step for all stages, metrics, the optimizer."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_plugins import ConfigError
from lora_plugins.field_checks import Check, check_fields, check_flag, check_names, check_whole, optional
from lora_plugins.tasks.argument_checks import check_ignored
from lora_plugins.tasks.data import BALANCED, Batch, VisionDataModule, check_targets
from lora_plugins.tasks.files import TRAIN
from lora_plugins.tasks.models import (
    ModelConfig,
    Source,
    build_network,
    default_targets,
    enable_checkpointing,
    read_model_config,
    refusing_small_images,
    source_of,
)
from lora_plugins.tasks.training.base_task import BaseTask
from lora_plugins.tasks.training.class_agreement import check_checkpoint, check_class_names, check_data
from lora_plugins.tasks.training.losses import (
    CROSS_ENTROPY,
    Objective,
    balanced_weights,
    check_class_weights,
    given_weights,
)
from lora_plugins.tasks.training.optimization import LR, WEIGHT_DECAY, OptimizerCallable, SchedulerCallable
from lora_plugins.tasks.training.provenance import PROVENANCE_KEY, Provenance
from lora_plugins.tasks.training.refused_sizes import is_of_sizes, refused_size
from lora_plugins.tasks.training.what_follows import next_commands, note_on_the_base

CONFUSION = "confusion"

_CHECKS: Mapping[str, Check] = {
    "class_weights": optional(check_class_weights),
    "gradient_checkpointing": check_flag,
    "ignore_index": check_whole,
    "class_names": optional(check_names),
}
"""What the arguments of a task can be, by name; the others are checked by whoever takes them."""


class VisionTask(BaseTask):
    """A network, trained with a loss by name, with metrics over whole splits.

    Images are expected in [0, 1] and are normalized here, as the network expects. Metrics are logged as `train/NAME`,
    `val/NAME` and `test/NAME`, the loss as `train/loss` and so on. `load_from_checkpoint` loads plain checkpoints and
    those of a `LoraCallback`, which hold only the adapter.

    Args:
        model: Which network, with which weights.
        loss: The loss, or a weighted sum of several: `cross_entropy + 0.5 * dice`.
        label_smoothing: Share of the probability that cross entropy spreads over all classes.
        class_weights: A weight for each class in cross entropy, or `balanced` for weights inverse to how often each
            class occurs in the data module's train split.
        optimizer: Makes the optimizer of the parameters that require gradients when training starts, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`; by default AdamW. The `optimizer:` of a YAML file replaces it.
        lr: Learning rate of the default optimizer.
        weight_decay: Weight decay of the default optimizer.
        lr_scheduler: Makes a scheduler of the optimizer and the number of all its steps, such as
            `torch.optim.lr_scheduler.CosineAnnealingLR` or `lora_plugins.tasks.warmup_cosine`. It is stepped after
            every optimizer step. By default the learning rate is constant.
        ema: Decay of an exponential moving average of the trained parameters, such as 0.99; 0 for none. The average is
            what is validated and saved.
        gradient_checkpointing: Whether activations are computed again in the backward, one block at a time, and not
            kept: a fraction of the memory for about a third more time. For networks of timm and transformers.
        ignore_index: The label that loss and metrics ignore, which is none of the classes.
        class_names: Names of the classes, in the order of the data's, for reports; by default those of the data module,
            or else their indices. They are saved in every file.

    Attributes:
        network: The network.
        network_logits: Calls the network on normalized images and returns its logits.
        head_modules: Names, relative to the task, of the modules whose parameters are newly initialized. They are
            trained and saved, whatever else is frozen.
        lora_targets: The layers to adapt if a `LoraConfig` names no `target_modules`.
        image_size: Height and width of the images of the last fit, or else of those that the network was made for; or
            None.
        interpolation: How these images were resized.
        confusion: The confusion matrix (true, predicted) of the last epoch, by stage.

    Raises:
        ConfigError: For an unknown name, or arguments that do not go together.
    """

    sources: ClassVar[Mapping[str, Source]]
    losses: ClassVar[Sequence[str]]
    main_metric: ClassVar[str]
    mean: Tensor
    std: Tensor
    weights: Tensor | None
    network_logits: Callable[[nn.Module, Tensor], Tensor]

    def __init__(
        self,
        model: ModelConfig,
        *,
        loss: str = CROSS_ENTROPY,
        label_smoothing: float = 0.0,
        class_weights: list[float] | str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr: float = LR,
        weight_decay: float = WEIGHT_DECAY,
        lr_scheduler: SchedulerCallable | None = None,
        ema: float = 0.0,
        gradient_checkpointing: bool = False,
        ignore_index: int = -100,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        given = {
            "loss": loss,
            "label_smoothing": label_smoothing,
            "class_weights": class_weights,
            "lr": lr,
            "weight_decay": weight_decay,
            "ema": ema,
            "gradient_checkpointing": gradient_checkpointing,
            "ignore_index": ignore_index,
            "class_names": class_names,
        }
        check_fields(given, _CHECKS)
        self._set_optimization(optimizer, lr, weight_decay, lr_scheduler, ema)
        # A checkpoint holds arguments as plain types, so that it loads with weights_only=True.
        model = read_model_config(model)
        names = None if class_names is None else list(class_names)
        self.save_hyperparameters({"model": asdict(model), **given, "class_names": names})
        if names is not None:
            check_class_names(names, model.num_classes)
        self.model_config, self.class_names, self.ignore_index = model, names, ignore_index
        check_ignored(ignore_index, self.class_labels)
        self.objective = Objective(loss, self.losses, ignore_index=ignore_index, label_smoothing=label_smoothing)
        self._set_class_weights(class_weights)
        self._build_network(model)
        if gradient_checkpointing:
            enable_checkpointing(self.network)
        metrics = self.build_metrics()
        self.train_metrics = self.build_train_metrics().clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.confusion: dict[str, Tensor] = {}
        self._images_seen = True

    def _set_class_weights(self, class_weights: list[float] | str | None) -> None:
        self.class_weights, classes = class_weights, self.model_config.num_classes
        if class_weights is not None and not self.objective.takes_class_weights:
            raise ConfigError("class_weights are for cross_entropy, which the loss does not hold.")
        counted = class_weights is None or (isinstance(class_weights, str) and class_weights == BALANCED)
        self.register_buffer("weights", None if counted else given_weights(class_weights, classes), persistent=False)

    def _build_network(self, model: ModelConfig) -> None:
        built = build_network(model, self.sources)
        mean, std = model.mean or built.mean, model.std or built.std
        if mean is None or std is None:
            raise ConfigError(
                f"The {model.source} model {model.name!r} does not say which mean and std its images should have: "
                "set `mean` and `std` of the model."
            )
        self.network, self.network_logits = built.module, source_of(model, self.sources).logits
        self.head_modules = tuple(f"network.{name}" for name in built.new_modules)
        self.lora_targets = default_targets(built.module, built.new_modules)
        self.image_size, self.interpolation, self.bgr = built.size, built.interpolation, built.bgr
        self._made_for = built.size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @abstractmethod
    def build_metrics(self) -> MetricCollection:
        """The metrics of one split, updated with what `preds` returns and the true labels.

        One of them may be `confusion`: it is stored in the attribute of that name and not logged.
        """

    def build_train_metrics(self) -> MetricCollection:
        """The metrics of the train split during training; by default those of the other splits."""
        return self.build_metrics()

    def preds(self, logits: Tensor) -> Tensor:
        """What metrics compute with, from logits (N, classes, ...): by default the predicted labels (N, ...)."""
        return logits.argmax(1)

    def raw_logits(self, images: Tensor) -> Tensor:
        """Normalizes images (N, channels, H, W) in [0, 1], of any precision, and calls the network on them.

        Raises:
            ConfigError: If they are whole numbers, or have another number of channels than the network takes.
        """
        if not images.is_floating_point():
            raise ConfigError(
                f"Images are {images.dtype}; a task takes fractions from 0 to 1. Divide those of 8 bits by 255, and "
                "those of 16 bits by 65535."
            )
        own, given = len(self.mean), images.shape[1]
        if own not in (1, given):
            raise ConfigError(
                f"{self.model_config.name} takes images of {own} channels, for which it has a `mean`, and these have "
                f"{given}. Files are read in color, with 3."
            )
        images = (images.to(self.mean) - self.mean) / self.std
        return self.network_logits(self.network, images.flip(1) if self.bgr else images)

    @abstractmethod
    def logits_for(self, images: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes, ...) laid out like the targets (N, ...)."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss over all labels but `ignore_index`; zero, not nan, if there are no others."""
        return self.objective(logits, targets, self.weights)

    def setup(self, stage: str) -> None:
        """Checks that data and model agree on the classes; adopts their names and, in a fit, what images are like.

        Raises:
            ConfigError: If they do not agree.
        """
        self._images_seen = stage != "fit"
        data = self._datamodule()
        if not isinstance(data, VisionDataModule):
            if self.class_weights == BALANCED and stage == "fit":
                raise ConfigError("class_weights is 'balanced', which takes a data module of lora_plugins to count.")
            return
        check_data(data, self.class_names, self.model_config.num_classes, self.ignore_index)
        self.class_names = self.class_names or data.class_names
        self.hparams["class_names"] = list(self.class_names)
        if self.class_weights == BALANCED and (stage == "fit" or TRAIN in data.splits):
            self.weights = balanced_weights(data.class_counts()).to(self.mean)
        if stage == "fit":
            self.image_size = data.size() or self.image_size
            self.interpolation = data.interpolation or self.interpolation

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._step(batch, "train", self.train_metrics)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Updates the metrics of the val split."""
        self._step(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Updates the metrics of the test split."""
        self._step(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predicted label of each image (N,), or of each of its pixels (N, H, W)."""
        logits: Tensor = self(Batch.read(batch).images)
        return logits.argmax(1)

    def on_train_epoch_end(self) -> None:
        """Logs and resets the metrics of the train split."""
        self._log(self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs and resets the metrics of the val split."""
        self._log(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs and resets the metrics of the test split."""
        self._log(self.test_metrics)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the classes of a checkpoint are those of the data: another order would be another label.

        Without a trainer, which has data, images are from now on as those of the checkpoint were.

        Raises:
            ConfigError: If they are not.
        """
        names = checkpoint.get("hyper_parameters", {}).get("class_names")
        if names and self.class_names:
            check_checkpoint(names, self.class_names)
        if self._trainer is None and PROVENANCE_KEY in checkpoint:
            self.adopt_images(checkpoint[PROVENANCE_KEY])
        super().on_load_checkpoint(checkpoint)

    def adopt_images(self, provenance: Provenance) -> None:
        """Sets what images are like to what a file says of those of its fit."""
        size = provenance["image_size"]
        self.image_size = None if size is None else (size[0], size[1])
        self.interpolation = provenance["interpolation"]
        self.bgr = provenance["bgr"]

    def on_fit_start(self) -> None:
        """Warns if what the fit will leave is of no use later."""
        if note := note_on_the_base(self.trainer, self.model_config):
            rank_zero_info(note)

    def mixup(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The images and (soft) targets to train on: by default unchanged."""
        return images, targets

    @property
    def metric_options(self) -> dict[str, Any]:
        """The arguments that metrics of torchmetrics over the classes of the task have in common."""
        classes, ignored = self.model_config.num_classes, self.ignore_index
        return {"num_classes": classes, "ignore_index": ignored, "validate_args": False}

    @property
    def class_labels(self) -> Sequence[str]:
        """Names of the classes, or else their indices."""
        return self.class_names or [str(i) for i in range(self.model_config.num_classes)]

    def provenance(self) -> dict[str, Any]:
        """Which task this is, in plain types: class, arguments, names of the classes, what images are like."""
        return {
            **super().provenance(),
            "image_size": None if self.image_size is None else list(self.image_size),
            "interpolation": self.interpolation,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "bgr": self.bgr,
        }

    def next_commands(self, trainer: Trainer) -> dict[str, str]:
        """Commands that go on with what a fit has left, by what they do; the command line prints them at its end."""
        return next_commands(trainer, self.model_config)

    def _step(self, batch: Any, stage: str, metrics: MetricCollection) -> Tensor:
        read = Batch.read(batch)
        targets = check_targets(read, self.model_config.num_classes, self.ignore_index).long()
        images, soft_targets = self.mixup(read.images, targets) if stage == "train" else (read.images, targets)
        logits = self._logits_told(images, targets)
        loss = self.loss(logits, soft_targets)
        metrics.update(self.preds(logits.detach()), targets)
        weight = cast(Any, self.objective.weight(soft_targets, self.weights))  # Lightning takes more than whole numbers
        name = f"{stage}/loss"
        self.log(name, loss, batch_size=weight, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def _logits_told(self, images: Tensor, targets: Tensor) -> Tensor:
        """The logits; turns the many errors by which networks refuse the size of images into one message.

        Raises:
            ConfigError: If it does.
        """
        try:
            with self._first_images_checked():
                return self.logits_for(images, targets)
        except Exception as error:
            if not is_of_sizes(error):
                raise
            raise refused_size(self.model_config.name, images, error) from error

    def _first_images_checked(self) -> AbstractContextManager[None]:
        """Refuses images that are too small, once in each fit; a compiled network would keep the hooks."""
        network = self.network
        compiled = torch.compiler.is_compiling() or any(each._compiled_call_impl for each in network.modules())
        if self._images_seen or compiled:
            return nullcontext()
        self._images_seen = True
        return refusing_small_images(network, self.model_config.name, self._made_for)

    def _log(self, metrics: MetricCollection) -> None:
        prefix = metrics.prefix or ""
        values = metrics.compute()
        confusion = values.pop(f"{prefix}{CONFUSION}", None)
        if confusion is not None:
            self.confusion[prefix.rstrip("/")] = confusion.cpu()
        for name, value in values.items():
            for label, scalar in self._scalars(name, value).items():
                self.log(label, scalar, prog_bar=label == f"{prefix}{self.main_metric}", sync_dist=True)
        with torch.inference_mode(False):  # or a fit after a validation could not update these tensors
            metrics.reset()

    def _scalars(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A metric as scalars: one, or one per class under the name of the class."""
        if value.ndim == 0:
            return {name: value}
        return {f"{name}/{label}": scalar for label, scalar in zip(self.class_labels, value, strict=True)}
