"""Facts about a run for its report: how it was trained, on what data, with which software, on which device."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from lora_plugins import Plan
from lora_plugins.tasks.reporting.val_loaders import first_loader
from lora_plugins.tasks.training import VisionTask

LIBRARIES: Mapping[str, str] = {
    "timm": "timm",
    "transformers": "transformers",
    "smp": "segmentation-models-pytorch",
    "torchvision": "torchvision",
}
"""The distribution that a source of networks is."""

PLAIN = "lora"
VARIANTS: Mapping[str, str] = {PLAIN: "LoRA", "dora": "DoRA"}
"""What variants are called in the field."""

DATA_PLACES = ("file", "source", "root")
"""Attributes of data modules that say where the data is."""

SEED_VARIABLE = "PL_GLOBAL_SEED"
"""The environment variable in which `seed_everything` of Lightning keeps the seed."""

Facts = dict[str, str]


def method_of(task: VisionTask, plans: Sequence[Plan]) -> str:
    """How a task is fine-tuned: with LoRA, in full, or its head alone."""
    if plans:
        ranks = sorted({layer.r for plan in plans for layer in plan.layers})
        name = " and ".join(dict.fromkeys(VARIANTS.get(plan.config.variant, plan.config.variant) for plan in plans))
        return f"{name}, r={ranks[0]}" if len(ranks) == 1 else f"{name}, r={ranks[0]} to {ranks[-1]}"
    trained = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
    if len(trained) == sum(1 for _ in task.parameters()):
        return "full fine-tuning"
    heads = tuple(f"{head}." for head in task.head_modules)
    return "frozen backbone" if all(name.startswith(heads) for name in trained) else "a part of the network"


def data_name(data: Any) -> str:
    """What data is called in a title."""
    place = _place(data)
    return Path(place).name or place if place else type(data).__name__.removesuffix("DataModule")


def training_facts(trainer: Trainer, task: VisionTask) -> Facts:
    """How a run is trained; collected when it starts."""
    data = cast(Any, trainer).datamodule
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    own = getattr(task.lr_scheduler, "__name__", None)
    schedulers = [own or type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    accumulate = trainer.accumulate_grad_batches
    facts = {
        "optimizer": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers),
        "learning rate": _rates(groups, task),
        "weight decay": ", ".join(dict.fromkeys(f"{group.get('weight_decay', 0):g}" for group in groups)),
        "schedule": ", ".join(schedulers) or "constant",
        "loss": str(task.hparams["loss"]),
        "batch size": f"{_batch_size(trainer, data)}"
        + (f" in each of {trainer.world_size} processes" if trainer.world_size > 1 else "")
        + (f", {accumulate} batches a step" if accumulate > 1 else ""),
        "gradients clipped at": f"{trainer.gradient_clip_val:g}" if trainer.gradient_clip_val else "",
        "moving average": f"{task.ema:g}" if task.ema else "",
        "precision": str(trainer.precision),
        "seed": os.environ.get(SEED_VARIABLE) or "none set",
    }
    return _known(facts)


def lora_facts(plans: Sequence[Plan]) -> Facts:
    """What the adapters are."""
    facts: Facts = {}
    for plan in plans:
        config = plan.config
        facts |= {
            "rank": str(config.r),
            "alpha": f"{plan.layers[0].alpha:g}",
            "init": config.init,
            "dropout": f"{config.dropout:g}" if config.dropout else "",
            "variant": "" if config.variant == PLAIN else VARIANTS.get(config.variant, config.variant),
            "layers": str(len(plan.layers)),
            "frozen norms": str(len(plan.frozen_norms)) if plan.frozen_norms else "",
        }
    return _known(facts)


def model_facts(task: VisionTask, size: Any) -> Facts:
    """What the network is."""
    config = task.model_config
    return _known(
        {
            "network": f"{config.name} ({config.source})",
            "weights": str(config.weights),
            "classes": str(config.num_classes),
            "image size": "" if size is None else f"{size[0]} x {size[1]}",
        }
    )


def data_facts(trainer: Trainer) -> Facts:
    """What the data is."""
    data = cast(Any, trainer).datamodule
    sizes = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
    return _known(
        {
            "module": "" if data is None else type(data).__name__,
            "where": _place(data),
            **{split: _length(loaders) for split, loaders in sizes.items()},
            "augmentation": str(getattr(data, "augmentation", "")),
            "sampler": str(getattr(data, "sampler", "")),
        }
    )


def environment_facts(trainer: Trainer, task: LightningModule) -> Facts:
    """Device and versions."""
    source = LIBRARIES.get(cast(VisionTask, task).model_config.source, "")
    names = dict.fromkeys(["lora-plugins", "torch", "lightning", source])
    versions = [f"{name} {found}" for name in names if (found := _version(name))]
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return {
        "device": count + _device_name(trainer.strategy.root_device),
        "versions": ", ".join(versions),
        "Python": platform.python_version(),
        "folder": os.getcwd(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"CPU ({platform.machine()}), threads: {torch.get_num_threads()} of {os.cpu_count()}"
    return cpu if device.type == "cpu" else device.type.upper()


def _rates(groups: Sequence[Mapping[str, Any]], task: VisionTask) -> str:
    """The learning rates, each with what is trained at it."""
    kinds = {id(parameter): _kind(name, task) for name, parameter in task.named_parameters()}
    of: dict[str, list[str]] = {}
    for group in groups:
        given = group.get("initial_lr", group.get("lr"))
        rate = "found by the optimizer" if given is None else f"{float(given):g}"  # as A2Grad and AliG do
        of.setdefault(rate, []).extend(kinds.get(id(parameter), "others") for parameter in group["params"])
    if len(of) <= 1:
        return "".join(of)
    return ", ".join(f"{rate} ({', '.join(sorted(dict.fromkeys(names)))})" for rate, names in of.items())


def _kind(name: str, task: VisionTask) -> str:
    factor = next((letter for letter in "AB" if f".lora_{letter}" in name), "")
    return factor or ("head" if name.startswith(tuple(f"{head}." for head in task.head_modules)) else "others")


def _batch_size(trainer: Trainer, data: Any) -> Any:
    return getattr(data, "batch_size", None) or getattr(trainer.train_dataloader, "batch_size", "unknown")


def _place(data: Any) -> str:
    return next((str(place) for name in DATA_PLACES if (place := getattr(data, name, None))), "")


def _length(loaders: Any) -> str:
    try:
        return f"{len(cast(Any, first_loader(loaders).dataset)):,} images"
    except (AttributeError, TypeError):  # a data set that does not know its length
        return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name) if name else ""
    except metadata.PackageNotFoundError:
        return ""


def _known(facts: Facts) -> Facts:
    return {label: value for label, value in facts.items() if value}
