"""The configuration that Lightning's `fit` runs: what was found, in the terms of a YAML file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_plugins.errors import counted, listing
from lora_plugins.tasks.autoconfig.found import LABELS, MASKS, Survey
from lora_plugins.tasks.autoconfig.mask_coding import MaskCoding
from lora_plugins.tasks.autoconfig.model_choice import Choice
from lora_plugins.tasks.autoconfig.recommended import RECIPES, Recipe
from lora_plugins.tasks.files import TRAIN, VAL, leaves_one, one_left_out

TASKS: Mapping[str, str] = {LABELS: "ImageClassificationTask", MASKS: "SemanticSegmentationTask"}
STEPS = 4
"""Steps that an epoch has at least, where there are images for that."""

ADAPTER, MERGED = "adapter", "merged.safetensors"
REPORT, PICTURE, CONFIG = "report.html", "predictions.png", "train.yaml"


@dataclass(frozen=True)
class Settings:
    """What flags say about training; None for what is to be inferred."""

    epochs: int | None
    rank: int | None
    lr: float | None
    batch_size: int
    image_size: tuple[int, int] | None
    device: str
    seed: int
    recipe: str


def configuration(found: Survey, choice: Choice, settings: Settings, out: Path) -> dict[str, Any]:
    """Makes the configuration of a run that writes into the folder `out`."""
    size = settings.image_size or found.size
    is_masks, settled = found.task == MASKS, RECIPES[settings.recipe][found.task]
    return {
        "seed_everything": settings.seed,
        "trainer": {
            "max_epochs": settings.epochs or settled.epochs,
            "accelerator": settings.device,
            "precision": _precision(settings.device),
            "num_sanity_val_steps": -1,
            **_given(gradient_clip_val=settled.clip),
            "log_every_n_steps": 1,
            "default_root_dir": str(out),
            "logger": _object("lightning.pytorch.loggers.TensorBoardLogger", save_dir=str(out), name="logs"),
            "callbacks": [
                _object("lora_plugins.tasks.BeforeAfter"),
                _object("lora_plugins.tasks.HtmlReport", path=str(out / REPORT)),
                *([_object("lora_plugins.tasks.PredictionPicture", path=str(out / PICTURE))] if is_masks else []),
            ],
        },
        "model": _object(
            f"lora_plugins.tasks.{TASKS[found.task]}",
            model={**choice.arguments, "num_classes": len(found.classes)},
            **_given(ignore_index=found.coding and found.coding.ignore_index),
            lr=settings.lr or settled.lr,
            **_given(lr_scheduler=settled.scheduler),
        ),
        "data": _object(
            f"lora_plugins.tasks.{found.module}",
            **found.arguments,
            **_given(image_size=size and [*size]),
            augmentation="crop_flip",
            batch_size=settings.batch_size,
        ),
        "lora": lora_fields(settled, settings.rank),
        "lora_callback": {
            "target": "network",
            "loraplus_lr_ratio": settled.loraplus_lr_ratio,
            "heads_lr_ratio": settled.heads_lr_ratio,
            "save_adapter_to": str(out / ADAPTER),
            "export_to": str(out / MERGED),
        },
    }


def lora_fields(recipe: Recipe, rank: int | None) -> dict[str, Any]:
    """Returns the fields of the `LoraConfig` of a recipe, with the rank of a flag if there is one."""
    return {**recipe.lora, **_given(r=rank)}


def described(found: Survey, choice: Choice, recipe: Recipe, made: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns what was inferred, in five lines: the subject, the finding, and the flags that overrule it."""
    trainer, data, model = made["trainer"], made["data"]["init_args"], made["model"]["init_args"]
    size = data.get("image_size") or choice.size
    named = found.classes[:6] if found.coding is None else map(found.coding.shown, found.classes[:6])
    shown = ", ".join(named) + (", ..." if len(found.classes) > 6 else "")
    coding = "" if found.coding is None else f"; masks are {found.coding.kind}{_ignored(found.coding)}"
    held = f" ({data['val_share']:g} of all)" if data.get("val_share") else ""
    none_of = f", none of them of {listing(found.unmeasured, 3)}" if found.unmeasured else ""
    images = f"images at {size[0]}x{size[1]}" if size else "images at the model's size"
    samples, batch = found.counts[TRAIN], data["batch_size"]
    steps = math.ceil(samples / batch) - leaves_one(samples, batch)
    where = f"{device_of(trainer['accelerator'])}, {trainer['precision']}"
    return [
        ("task", f"{found.task}: {found.found}", "--masks"),
        ("classes", f"{len(found.classes)}: {shown}{coding}", found.named_by),
        (
            "splits",
            f"{counted(samples, 'image')} to train, {found.counts[VAL]} to validate on{held}{none_of}"
            f"{_left(found.left_out)}",
            "--val-share",
        ),
        (
            "model",
            f"{choice.name}, weights: {choice.weights}, {images}, LoRA of rank {made['lora']['r']} on {recipe.adapted}",
            "--model --weights --image-size --rank --recipe",
        ),
        (
            "training",
            f"{counted(trainer['max_epochs'], 'epoch')} of {counted(steps, 'step')} of "
            f"{counted(batch, 'image')}, lr {model['lr']:g} {recipe.schedule}, {where}, "
            f"seed {made['seed_everything']}",
            "--epochs --batch-size --lr --device --seed",
        ),
    ]


def _left(paths: Sequence[Path]) -> str:
    """Tells how much is not read, with an example."""
    return f"; {len(paths)} left out, such as {one_left_out(paths)}" if paths else ""


def _ignored(coding: MaskCoding) -> str:
    if coding.colors is not None:
        return ""
    return f", {0 if coding.reduce_labels else coding.ignore_index} is ignored"


def _given(**options: Any) -> dict[str, Any]:
    """Leaves out what is None, so that its default holds."""
    return {name: value for name, value in options.items() if value is not None}


def _object(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": arguments} if arguments else {})}


def batch_size(found: Survey, recipe: Recipe) -> int:
    """The largest power of two that leaves some steps an epoch, up to what is usual for the task."""
    fitting = max(2, found.counts[TRAIN] // STEPS)
    return min(recipe.largest_batch, int(2 ** (fitting.bit_length() - 1)))


def _precision(device: str) -> str:
    import torch

    return "bf16-mixed" if device_of(device) == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def device_of(device: str) -> str:
    """The device that a flag means: `cpu`, `cuda` or `mps`, the kinds that Lightning finds by itself."""
    if device != "auto":
        return device
    from lora_plugins.devices import default_device

    kind = default_device().type
    return kind if kind in ("cuda", "mps") else "cpu"
