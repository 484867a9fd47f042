"""One run: a task, a method of fine-tuning it, a seed; and the result."""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lora_plugins import LoraConfig, tasks
from lora_plugins.inplace import freeze, has_statistics
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.integrations.lightning.cli import recipe_path
from lora_plugins.tasks import (
    ImageClassificationTask,
    ImageFolderDataModule,
    MaskFolderDataModule,
    ModelConfig,
    SemanticSegmentationTask,
    warmup_cosine,
)

HALF = (0.5, 0.5, 0.5)
CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
VOID = 11


@dataclass(frozen=True)
class Tuning:
    """What was tuned for a method of fine-tuning on a task.

    Attributes:
        head_lr: Learning rate of the new head.
        lr: Learning rate of the adapters, or of the pretrained weights where they are trained.
        norm: Whether the statistics of the pretrained normalization layers stay or move.
        alpha: The numerator of the adapters' scaling, alike at every rank: with alpha = r, and so a scaling of 1, the
            steps of Adam grow with the rank, and a rate that suits r=8 is too high for r=32.
        everywhere: Whether every layer is adapted and all biases are trained, in place of the task's default layers.
        quantize: How the weights of adapted layers are stored; None for floating numbers.
        init: How the adapters start.
        loraplus: Learning rate of every B, as a multiple of `lr`.
    """

    head_lr: float
    lr: float = 0.0
    norm: Literal["freeze", "track"] = "freeze"
    alpha: float = 8.0
    everywhere: bool = False
    quantize: str | None = None
    init: str = "kaiming"
    loraplus: float = 1.0


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning: the rank of LoRA, 0 for the head alone, None for everything; and its tuning by task."""

    rank: int | None
    tuning: Mapping[str, Tuning]


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        seed: The seed of the run.
        metric: Accuracy or mean IoU on the val split after the last epoch.
        trained: Parameters that were trained.
        total: Parameters of the network with adapters.
        seconds: Median time of an epoch of training.
        mebibytes: Peak memory of the process during the run, above what it held before.
        adapter: Bytes of the adapter folder (LoRA), or of what was trained (the others).
    """

    seed: int
    metric: float
    trained: int
    total: int
    seconds: float
    mebibytes: float
    adapter: int


NETWORK = "tf_efficientnet_lite0"
WEIGHTS = f"package:{NETWORK}"


def _classification(root: Path) -> tuple[Any, Any]:
    data = ImageFolderDataModule(
        str(root / "cifar-mini"), image_size=(96, 96), augmentation="crop_flip", batch_size=16, check_files=False
    )
    model = ModelConfig("timm", NETWORK, 10, WEIGHTS, {}, HALF, HALF)
    return ImageClassificationTask(model, lr_scheduler=warmup_cosine), data


def _segmentation(decoder: str, decoder_options: Mapping[str, Any], root: Path) -> tuple[Any, Any]:
    data = MaskFolderDataModule(
        str(root / "camvid-mini"),
        classes=CAMVID,
        ignore_index=VOID,
        image_size=(96, 128),
        augmentation="flip",
        batch_size=4,
        check_files=False,
    )
    options = {"encoder_name": f"tu-{NETWORK}", **decoder_options}
    model = ModelConfig("smp", decoder, len(CAMVID), WEIGHTS, options, HALF, HALF)
    return SemanticSegmentationTask(model, lr_scheduler=warmup_cosine, ignore_index=VOID), data


def _digits(recipe: str, batch_size: int, root: Path) -> tuple[Any, Any]:
    """The task and the data of a recipe of digits, which come along."""
    made = yaml.safe_load(recipe_path(recipe).read_text(encoding="utf-8"))
    (task, fields), (data, options) = (_class_and_arguments(made[part]) for part in ("model", "data"))
    network = ModelConfig(**fields.pop("model"))
    return task(network, **{**fields, "lr_scheduler": warmup_cosine}), data(**{**options, "batch_size": batch_size})


def _class_and_arguments(part: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    return getattr(tasks, part["class_path"].rpartition(".")[2]), part["init_args"]


@dataclass(frozen=True)
class Case:
    """A task on a data set, and how long it trains."""

    make: Callable[[Path], tuple[Any, Any]]
    epochs: int


UNET = {"decoder_channels": [64, 48, 32, 24, 16]}
MLP = {"decoder_segmentation_channels": 32}
"""SegFormer's decoder: a 1x1 convolution for each stage, and one over all. What is seen, the encoder has to see."""

CASES: Mapping[str, Case] = MappingProxyType(
    {
        "classification": Case(_classification, 8),
        "segmentation": Case(partial(_segmentation, "Unet", UNET), 8),
        "segmentation, MLP decoder": Case(partial(_segmentation, "Segformer", MLP), 12),
        "digits": Case(partial(_digits, "cls", 32), 20),
        "scenes of digits": Case(partial(_digits, "seg", 8), 20),
    }
)


class Watch(Callback):
    """Counts what is trained and times each epoch of training, validation left out."""

    def __init__(self) -> None:
        self.trained, self.total, self.seconds = 0, 0, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts."""
        parameters = list(pl_module.network.parameters())
        self.total = sum(p.numel() for p in parameters)
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops it after the last batch."""
        if trainer.is_last_batch:
            self.seconds.append(time.perf_counter() - self._start)


def run(root: Path, case: str, method: Method, seed: int, epochs: int | None = None) -> Outcome:
    """Runs a case of `CASES` once in a process of its own, whose peak memory is then that of the run."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(_run, (root, case, method.rank, method.tuning[case], seed, epochs))


def _run(root: Path, case: str, rank: int | None, tuning: Tuning, seed: int, epochs: int | None) -> Outcome:
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    task, data = CASES[case].make(root)
    epochs, watch, before = epochs or CASES[case].epochs, Watch(), _peak()
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        callbacks = [watch, _lora(task, rank, tuning, adapter)] if rank else [watch]
        if not rank:
            _prepare(task, rank, tuning)
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=epochs,
        )
        trainer.fit(task, datamodule=data)
        size = sum(path.stat().st_size for path in adapter.rglob("*")) if rank else 4 * watch.trained
    value = float(trainer.callback_metrics[f"val/{task.main_metric}"])
    seconds = sorted(watch.seconds)[len(watch.seconds) // 2]
    return Outcome(seed, value, watch.trained, watch.total, seconds, _peak() - before, size)


def _lora(task: Any, rank: int, tuning: Tuning, folder: Path) -> Callback:
    """Adapters where the task says, in every other respect as a user would have them."""
    task.lr = tuning.lr
    config = LoraConfig(r=rank, alpha=tuning.alpha, norm=tuning.norm, init=tuning.init, quantize=tuning.quantize)
    if tuning.everywhere:
        config = replace(config, target_modules="all", bias="all")
    return LoraCallback(
        config,
        target="network",
        save_adapter_to=str(folder),
        dequantize=True,
        print_plan=False,
        loraplus_lr_ratio=tuning.loraplus,
        heads_lr_ratio=tuning.head_lr / tuning.lr,
    )


def _prepare(task: Any, rank: int | None, tuning: Tuning) -> None:
    """The two methods without adapters: the new head alone, or everything, with a rate of its own for the new head."""
    heads = tuple(f"{head}." for head in task.head_modules)
    named = dict(task.named_parameters())
    head = [p for name, p in named.items() if name.startswith(heads)]
    rest = [p for name, p in named.items() if not name.startswith(heads)]
    for parameter in rest:
        parameter.requires_grad_(rank is None)
    for name, module in task.named_modules():
        if tuning.norm == "freeze" and has_statistics(module) and not name.startswith(heads):
            freeze(module)

    def configure_optimizers() -> Any:
        groups = [{"params": head, "lr": tuning.head_lr}, {"params": rest, "lr": tuning.lr}]
        optimizer = torch.optim.AdamW(groups if rank is None else groups[:1], weight_decay=task.weight_decay)
        steps = int(task.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": warmup_cosine(optimizer, steps), "interval": "step"},
        }

    task.configure_optimizers = configure_optimizers


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
