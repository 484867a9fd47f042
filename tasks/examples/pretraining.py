"""Trains the backbones that are shipped: `python -m lora_plugins.tasks pretrain [FOLDER]`.

Both learn the digits 0 to 3, upright, from random weights, and never see what the fine-tuning examples train on (4 to
9, rotated by a quarter turn). It takes five to ten minutes on one core, and is reproducible on one machine.
The architectures are those of `seg.yaml` and `cls.yaml`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save_file

from lora_plugins.tasks.classification import ImageClassificationTask
from lora_plugins.tasks.data import VisionDataModule
from lora_plugins.tasks.examples.digits import DigitsDataModule
from lora_plugins.tasks.examples.scenes import DigitScenesDataModule
from lora_plugins.tasks.models import ModelConfig
from lora_plugins.tasks.segmentation import SemanticSegmentationTask
from lora_plugins.tasks.training import VisionTask, warmup_cosine

DIGITS = (0, 1, 2, 3)
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """How one backbone is trained.

    Attributes:
        configuration: The YAML file with its architecture.
        task: The class of the task.
        data: Makes the data module.
        epochs: The number of epochs.
        lr: The peak learning rate, after a warm-up and before a cosine decay.
    """

    configuration: str
    task: type[VisionTask]
    data: Callable[[], VisionDataModule]
    epochs: int
    lr: float


RECIPES: Mapping[str, Recipe] = {
    "digits_classifier": Recipe(
        "cls.yaml", ImageClassificationTask, lambda: DigitsDataModule(DIGITS), epochs=40, lr=1e-3
    ),
    "scenes_segformer": Recipe(
        "seg.yaml",
        SemanticSegmentationTask,
        lambda: DigitScenesDataModule(DIGITS, train_scenes=1024),
        epochs=30,
        lr=3e-3,
    ),
}


def architecture(configuration: str, *, num_classes: int, weights: str) -> ModelConfig:
    """The model of a shipped YAML file, with other classes and other weights."""
    text = (files("lora_plugins.tasks") / configuration).read_text(encoding="utf-8")
    model = ModelConfig(**yaml.safe_load(text)["model"]["init_args"]["model"])
    return replace(model, num_classes=num_classes, weights=weights)


def pretrain(name: str, folder: Path, epochs: int | None = None) -> Path:
    """Trains one backbone of `RECIPES`, writes `NAME.safetensors` into a folder, and returns that file."""
    recipe = RECIPES[name]
    seed_everything(SEED)
    data = recipe.data()
    model = architecture(recipe.configuration, num_classes=len(data.class_names), weights="none")
    task = recipe.task(model, lr=recipe.lr, lr_scheduler=partial(warmup_cosine, warmup=0.05))
    trainer = Trainer(
        max_epochs=epochs or recipe.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        deterministic=True,
    )
    trainer.fit(task, datamodule=data)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in task.network.state_dict().items()}, path)
    print(f"{path}: val/{task.main_metric} {float(trainer.callback_metrics[f'val/{task.main_metric}']):.3f}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all backbones, into the package itself or into the folder that is given; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora_plugins.tasks pretrain")
    own = Path(str(files("lora_plugins.tasks") / "weights"))
    parser.add_argument(
        "folder", type=Path, nargs="?", default=own, help="where to write; by default the package itself"
    )
    folder = parser.parse_args(arguments).folder
    torch.set_num_threads(1)  # networks as small as these gain nothing from more, and the files stay the same
    for name in RECIPES:
        pretrain(name, folder)
    return 0
