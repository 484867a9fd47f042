"""One run: a task, a way of fine-tuning it, a seed; and what it came to."""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import (
    ImageClassificationTask,
    ImageFolderDataModule,
    MaskFolderDataModule,
    ModelConfig,
    SemanticSegmentationTask,
)

HALF = (0.5, 0.5, 0.5)
CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
VOID = 11


@dataclass(frozen=True)
class Way:
    """A way of fine-tuning: the rank of LoRA, 0 for the head alone, None for everything; and a rate for each task."""

    rank: int | None
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Adapting:
    """How LoRA is applied to a task: what normalisation does, and the head's rate as a multiple of the adapters'."""

    norm: Literal["freeze", "track"]
    heads_lr_ratio: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        metric: Accuracy or mean IoU on the val split after the last epoch.
        trained: Parameters that were trained.
        total: Parameters of the network with adapters.
        seconds: Median time of an epoch of training.
        mebibytes: Peak memory of the process during the run, above what it held before.
        adapter: Bytes of the adapter folder (LoRA), or of what was trained (the others).
    """

    metric: float
    trained: int
    total: int
    seconds: float
    mebibytes: float
    adapter: int


def _classification(root: Path, weights: Path, lr: float) -> tuple[Any, Any]:
    data = ImageFolderDataModule(
        str(root / "cifar-mini"), image_size=(96, 96), augmentation="flip", batch_size=32, check_files=False
    )
    model = ModelConfig("timm", "efficientnet_lite0", 10, str(weights), {}, HALF, HALF)
    return ImageClassificationTask(model, lr=lr, schedule="cosine", warmup=0.1), data


def _segmentation(root: Path, weights: Path, lr: float) -> tuple[Any, Any]:
    data = MaskFolderDataModule(
        str(root / "camvid-mini"),
        classes=CAMVID,
        ignore_index=VOID,
        image_size=(96, 128),
        augmentation="flip",
        batch_size=8,
        check_files=False,
    )
    options = {"encoder_name": "tu-efficientnet_lite0", "decoder_channels": [64, 48, 32, 24, 16]}
    model = ModelConfig("smp", "Unet", len(CAMVID), str(weights), options, HALF, HALF)
    return SemanticSegmentationTask(model, lr=lr, schedule="cosine", warmup=0.1, ignore_index=VOID), data


@dataclass(frozen=True)
class Case:
    """A task on a data set, with the weights it starts from and how long it trains."""

    make: Callable[[Path, Path, float], tuple[Any, Any]]
    weights: str
    epochs: int
    adapting: Adapting


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "classification": Case(_classification, "classifier", 6, Adapting("freeze", 100)),
        "segmentation": Case(_segmentation, "encoder", 10, Adapting("track", 5)),
    }
)


class Watch(Callback):
    """Counts what is trained and times each epoch of training, validation left out."""

    def __init__(self) -> None:
        self.trained, self.total, self.seconds = 0, 0, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count."""
        parameters = list(pl_module.network.parameters())
        self.total = sum(p.numel() for p in parameters)
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop it after the last batch."""
        if trainer.is_last_batch:
            self.seconds.append(time.perf_counter() - self._start)


def run(root: Path, weights: Mapping[str, Path], case: str, way: Way, seed: int, epochs: int | None = None) -> Outcome:
    """Make one run in a process of its own, whose peak memory is then that of the run.

    Args:
        root: The folder of data sets.
        weights: What `write_weights` wrote.
        case: A name in `CASES`.
        way: How it is fine-tuned.
        seed: The seed of everything.
        epochs: For how long, if not as the case says.
    """
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(_run, (root, weights, case, way.rank, way.rates[case], seed, epochs))


def _run(root: Path, weights: Any, case: str, rank: int | None, lr: float, seed: int, epochs: int | None) -> Outcome:
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    task, data = CASES[case].make(root, weights[CASES[case].weights], lr)
    watch = Watch()
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        callbacks: list[Callback] = [watch]
        if rank:
            how = CASES[case].adapting
            config = LoraConfig(r=rank, alpha=rank, norm=how.norm)  # the task says what to adapt
            lora = LoraCallback(
                config,
                target="network",
                save_adapter_to=str(adapter),
                print_plan=False,
                heads_lr_ratio=how.heads_lr_ratio,
            )
            callbacks.append(lora)
        elif rank == 0:
            _freeze(task)
        trainer = Trainer(
            max_epochs=epochs or CASES[case].epochs,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=epochs or CASES[case].epochs,
        )
        trainer.fit(task, datamodule=data)
        size = sum(path.stat().st_size for path in adapter.rglob("*")) if rank else 4 * watch.trained
    value = float(trainer.callback_metrics[f"val/{task.main_metric}"])
    seconds = sorted(watch.seconds)[len(watch.seconds) // 2]
    return Outcome(value, watch.trained, watch.total, seconds, _peak() - before, size)


def _freeze(task: Any) -> None:
    """Train the new head alone; frozen normalisation keeps its statistics, as with LoRA."""
    heads = tuple(f"{head}." for head in task.head_modules)
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(name.startswith(heads))
    for name, module in task.network.named_modules():
        module.train(f"network.{name}.".startswith(heads))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
