"""The samples of the val split that a report shows: judged by their loss, chosen, and made into pictures."""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.pages import Example
from lora_plugins.tasks.reporting.class_results import mean_iou
from lora_plugins.tasks.reporting.figures import as_pixels
from lora_plugins.tasks.reporting.val_loaders import samples_of, val_precision
from lora_plugins.tasks.segmentation import IGNORED, Mask, class_colors, colorize, palette_image
from lora_plugins.tasks.training import VisionTask, evaluated_on

MOST, PER_CLASS = 48, 2
"""A page has at most so many examples; within that, each class is in so many."""

SIDE, PHOTO_SIDE = 480, 96
"""The longest side of a picture in pixels, and that from which it is stored as a JPEG."""

RANKS = 3
PALETTE = 256


@dataclass(frozen=True)
class Judged:
    """The samples of a split, judged.

    Attributes:
        losses: The cross entropy of each, (N,), the mean over all labels but `ignore_index`.
        classes: The classes that each shows or was predicted to show.
        confusion: The confusion matrix (true, predicted) of all.
        has_ignored: Whether there are labels that are ignored.
    """

    losses: Tensor
    classes: Sequence[frozenset[int]]
    confusion: Tensor
    has_ignored: bool


@contextmanager
def on_device_of(trainer: Trainer, task: VisionTask) -> Iterator[None]:
    """Puts the task into eval mode and on the device that it left when the fit ended."""
    with evaluated_on(task, trainer.strategy.root_device), torch.inference_mode():
        yield


def judge(task: VisionTask, loader: DataLoader[Any]) -> Judged:
    """Judges the samples of a loader, in the order of its data set."""
    classes, ignored = task.model_config.num_classes, task.ignore_index
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    losses: list[Tensor] = []
    shown: list[frozenset[int]] = []
    has_ignored = False
    for batch in _in_order(loader):
        targets, logits = _targets_and_logits(task, Batch.read(batch))
        predicted = logits.argmax(1)
        losses.append(_losses(logits, targets, ignored).cpu())
        confusion += multiclass_confusion_matrix(predicted, targets, **task.metric_options).cpu()
        has_ignored |= bool((targets == ignored).any())
        shown += [
            frozenset(np.unique(torch.stack([true, guess]).cpu().numpy()).tolist()) - {ignored}
            for true, guess in zip(targets, predicted, strict=True)
        ]
    return Judged(torch.cat(losses).nan_to_num(0.0), shown, confusion, has_ignored)


def choose(judged: Judged, samples: int) -> list[int]:
    """The indices of samples to show, the highest loss first.

    They are the `samples` with the highest loss and as many with the lowest, and the worst of each class that these do
    not show.
    """
    order = judged.losses.argsort(descending=True, stable=True).tolist()
    chosen = dict.fromkeys([*order[:samples], *order[::-1][:samples]])
    counts = Counter(label for index in chosen for label in judged.classes[index])
    for index in order:
        missing = [label for label in judged.classes[index] if counts[label] < PER_CLASS]
        if missing and index not in chosen and len(chosen) < MOST:
            chosen[index] = None
            counts.update(judged.classes[index])
    return [index for index in order if index in chosen]


def example(task: VisionTask, loader: DataLoader[Any], index: int, judged: Judged) -> Example:
    """A sample with what is predicted for it now, as pictures."""
    batch = samples_of(loader, [index])
    targets, logits = _targets_and_logits(task, batch)
    pixels = Image.fromarray(as_pixels(batch.images[0]))
    pixels.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    common = Example(
        name=batch.names[0] if batch.names else f"sample {index}",
        image=_data_url(pixels),
        width=pixels.width,
        height=pixels.height,
        loss=float(judged.losses[index]),
        classes=tuple(sorted(judged.classes[index])),
    )
    return _with_masks(task, common, targets, logits) if targets.ndim > 1 else _with_labels(common, targets, logits)


def _with_masks(task: VisionTask, common: Example, targets: Tensor, logits: Tensor) -> Example:
    classes, ignored, predicted = task.model_config.num_classes, task.ignore_index, logits.argmax(1)
    size = (common.width, common.height)
    truth, guess = (_mask_url(mask[0].cpu().numpy(), classes, ignored, size) for mask in (targets, predicted))
    score = mean_iou(multiclass_confusion_matrix(predicted, targets, **task.metric_options).cpu())
    return replace(common, truth=truth, prediction=guess, score=score)


def _with_labels(common: Example, targets: Tensor, logits: Tensor) -> Example:
    probabilities, labels = logits[0].float().softmax(0).topk(min(RANKS, logits.shape[1]))
    true = int(targets[0])
    ranking = tuple(zip(labels.tolist(), probabilities.tolist(), strict=True))
    return replace(common, true_class=true if 0 <= true < logits.shape[1] else None, ranking=ranking)


def _targets_and_logits(task: VisionTask, batch: Batch) -> tuple[Tensor, Tensor]:
    targets = cast(Tensor, batch.targets).long().to(task.device)
    with val_precision(task):
        return targets, task.logits_for(batch.images.to(task.device), targets)


def _losses(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Cross entropy of each sample, (N,), the mean over all labels but `ignored`."""
    losses = cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="none")
    counts = (targets != ignored).reshape(len(targets), -1).sum(1)
    return losses.reshape(len(targets), -1).sum(1) / counts.clamp(min=1)


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same samples, in the order of the data set and all in this process's share, if it has one."""
    if not isinstance(loader, DataLoader):  # any iterable over batches will do for a Trainer
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 1,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )


def _mask_url(mask: Mask, classes: int, ignored: int, size: tuple[int, int]) -> str:
    colors = class_colors(classes)
    if classes < PALETTE:
        picture = palette_image(np.where(mask == ignored, classes, mask), np.concatenate([colors, [IGNORED]]))
    else:
        picture = Image.fromarray(colorize(mask, colors, ignored))
    return _data_url(picture.resize(size, Image.Resampling.NEAREST))


def _data_url(picture: Image.Image) -> str:
    """A picture in a `data:` URL: photographs as JPEG, masks and very small pictures exactly, as PNG."""
    photo = picture.mode == "RGB" and max(picture.size) >= PHOTO_SIDE
    kind, options = ("jpeg", {"quality": 88}) if photo else ("png", {"optimize": True})
    stream = io.BytesIO()
    picture.save(stream, kind, **cast(Any, options))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
