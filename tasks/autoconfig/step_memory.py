"""How many images a step can take: what one of them keeps for the backward, and how much memory there is."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.errors import sentence
from lora_plugins.integrations.lightning.module import with_declarations
from lora_plugins.tasks.classification import ImageClassificationTask
from lora_plugins.tasks.models import ModelConfig, refusing_small_images
from lora_plugins.tasks.segmentation import SemanticSegmentationTask

Task = ImageClassificationTask | SemanticSegmentationTask
CLASSES: Mapping[str, type[Task]] = {cls.__name__: cls for cls in (ImageClassificationTask, SemanticSegmentationTask)}

SHARE = 0.5
"""Of the memory that is free; the rest is for gradients, optimizers, workers, and what a step needs for moments."""

TRIED = 2
"""Images of the trial: a batch norm of a small map needs more than one."""

DEFAULT_SIZE = (224, 224)
GROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""


def kept_bytes(task_class: str, model: Mapping[str, Any], size: tuple[int, int] | None, lora: Mapping[str, Any]) -> int:
    """Bytes that a training step keeps for its backward, for each image; measured on random weights, on the CPU.

    `model` and `lora` are fields of a `ModelConfig` and a `LoraConfig`. Without a size, images are as the model was
    made for.

    Raises:
        ConfigError: If the network does not take images of that size.
    """
    task = CLASSES[task_class](ModelConfig(**{**model, "weights": "none"}))
    LoraModel(task.network, with_declarations(LoraConfig(**lora), task, task.network, "network"))
    height, width = size or task.image_size or DEFAULT_SIZE
    owned = {_place(tensor) for tensor in (*task.parameters(), *task.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in owned:
            kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    per_pixel = task.main_metric == "mean_iou"
    try:
        images = torch.rand(TRIED, len(task.mean), height, width)
        targets = torch.zeros(TRIED, *((height, width) if per_pixel else ()), dtype=torch.long)
        with (
            refusing_small_images(task.network, model["name"], task.image_size),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss = task.train().loss(task.logits_for(images, targets), targets)
        torch.autograd.backward(loss)
    except ConfigError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"The model {model['name']} cannot be trained on images of {height}x{width}: {sentence(error)} Choose "
            "another --image-size or --model."
        ) from error
    return sum(kept.values()) // TRIED


def fitting_batch(wanted: int, per_image: int, free: int | None) -> int:
    """The batch size that was wanted, halved until it fits.

    `wanted` is a power of two; `free` is None where it is not known.

    Raises:
        ConfigError: If not even one image fits.
    """
    if free is None:
        return wanted
    if per_image > free:
        raise ConfigError(
            f"A training step takes {_mebibytes(per_image)} for one image, and {_mebibytes(free)} are free. Choose a "
            "smaller --image-size or --model, or another --device."
        )
    while wanted > 1 and wanted * per_image > SHARE * free:
        wanted //= 2
    return wanted


def free_bytes(device: str) -> int | None:
    """Bytes that are free on a device, `cpu`, `cuda` or `mps`; None where nothing says so."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform != "linux":
        return None
    limits = [_available(), _left_of_group()]
    return min((limit for limit in limits if limit is not None), default=None)


def _available() -> int | None:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 2**10 if found else None


def _left_of_group() -> int | None:
    """Returns the memory that a container may still use; cached files in its usage could be freed."""
    try:
        limit, used = ((GROUPS / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (GROUPS / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(limit) - int(used) + int(cached.get("inactive_file", 0)) if limit.isdigit() else None


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
