"""Losses by name, alone or as a weighted sum: `cross_entropy`, `cross_entropy + dice`, `focal + 0.5 * lovasz`."""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_plugins import ConfigError
from lora_plugins.field_checks import check_name, number_from, shown
from lora_plugins.tasks.errors import unknown

CROSS_ENTROPY = "cross_entropy"
TERM = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)\s*\*)?\s*(\w+)\s*")
"""A name, and what stands before it: a factor of at least 0."""

TINY = torch.finfo(torch.float32).tiny


SMP_LOSSES: Mapping[str, str] = {"focal": "FocalLoss", "dice": "DiceLoss", "lovasz": "LovaszLoss"}
"""Of segmentation-models-pytorch: focal (arXiv 1708.02002), Dice (arXiv 1606.04797), Lovász (arXiv 1705.08790)."""


def _smp_loss(name: str, ignore_index: int) -> Any:
    from segmentation_models_pytorch import losses

    loss = getattr(losses, SMP_LOSSES[name])("multiclass", ignore_index=ignore_index)
    if name != "lovasz":
        return loss
    return partial(_in_single_precision, loss)  # it knows no other


def _in_single_precision(loss: Any, logits: Tensor, targets: Tensor) -> Any:
    return loss(logits.float(), targets)


class Objective:
    """A weighted sum of losses over all labels but `ignore_index`; zero, not nan, if there are no others.

    Cross entropy is zero as well where all of them are of classes whose weight is 0. All is computed in single
    precision or better: sums over many pixels overflow in float16.

    Args:
        text: Names joined by `+`, each with an optional factor: `cross_entropy + 0.5 * dice`.
        allowed: The allowed names.
        ignore_index: The label that is ignored.
        label_smoothing: Share of the probability that cross entropy spreads over all classes.

    Raises:
        ConfigError: For a name that is not allowed, or a sum that cannot be parsed.
    """

    def __init__(self, text: str, allowed: Collection[str], *, ignore_index: int, label_smoothing: float = 0.0) -> None:
        check_name("loss", text)
        number_from(0, below=1)("label_smoothing", label_smoothing)
        self.factors = _parsed(text, allowed)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        if label_smoothing and CROSS_ENTROPY not in self.factors:
            raise ConfigError(f"label_smoothing is for cross_entropy, which the loss {text!r} does not hold.")
        self._terms = {name: _smp_loss(name, ignore_index) for name in self.factors if name != CROSS_ENTROPY}

    @property
    def takes_class_weights(self) -> bool:
        """Whether one of the losses takes class weights: cross entropy."""
        return CROSS_ENTROPY in self.factors

    @property
    def takes_soft_targets(self) -> bool:
        """Whether targets may be probabilities of classes, as mixup makes them: only cross entropy alone does."""
        return set(self.factors) == {CROSS_ENTROPY}

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of logits (N, classes, ...) for labels (N, ...), or for soft targets (N, classes).

        Cross entropy takes a weight for each class, (classes,).
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = None if weights is None else weights.to(logits)
        if targets.is_floating_point():
            return self.factors[CROSS_ENTROPY] * self._cross_entropy_of_mixed(logits, targets, weights)
        if not (targets != self.ignore_index).any():
            return logits.sum() * 0
        total = logits.new_zeros(())
        for name, factor in self.factors.items():
            cross = name == CROSS_ENTROPY
            term = self._cross_entropy(logits, targets, weights) if cross else self._terms[name](logits, targets)
            total = total + factor * term
        return total

    def weight(self, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The weight of the loss of a batch in a mean over batches: the share of its labels that count, in samples.

        So the mean of cross entropy over a split is the same in any batches. It is above 0: a mean of nothing is 0.
        """
        if targets.is_floating_point():
            total = targets.new_tensor(len(targets)) if weights is None else (targets @ weights.to(targets)).sum()
            return total.clamp(min=TINY)
        counted = targets != self.ignore_index
        if weights is not None:
            counted = counted * weights.float()[targets.where(counted, 0)]
        return (counted.sum() / targets[0].numel()).clamp(min=TINY)

    def _cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None and not weights[targets[targets != self.ignore_index]].any():
            return logits.sum() * 0
        return cross_entropy(
            logits, targets, weights, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )

    def _cross_entropy_of_mixed(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None and not weights[targets.any(0)].any():
            return logits.sum() * 0
        loss = cross_entropy(logits, targets, weights, label_smoothing=self.label_smoothing)
        # Torch divides the loss of labels by their weights, and that of soft targets by how many there are.
        return loss if weights is None else loss * len(targets) / self.weight(targets, weights)


def balanced_weights(counts: Tensor) -> Tensor:
    """Class weights by counts (classes,): `total / (classes * count)`, or 1 for a class that never occurs."""
    occurs = counts > 0
    weights = counts.sum() / (occurs.sum() * counts.clamp(min=1))
    return torch.where(occurs, weights, 1.0)


def check_class_weights(name: str, value: object) -> None:
    """Class weights, as a list or a word: Lightning, which saves arguments, cannot compare arrays."""
    if not isinstance(value, list | tuple | str):
        raise ConfigError(f"{name} is {shown(value)}; it is a list of numbers, or 'balanced'.")


def given_weights(weights: object, classes: int) -> Tensor:
    """Class weights that are given as numbers, (classes,).

    Raises:
        ConfigError: If they are no list of as many numbers of at least 0.
    """
    if not isinstance(weights, list | tuple) or len(weights) != classes:
        raise ConfigError(f"class_weights is {shown(weights)}; it is a list of {classes} numbers, or 'balanced'.")
    for index, weight in enumerate(weights):
        number_from(0)(f"class_weights[{index}]", weight)
    return torch.tensor(weights, dtype=torch.float32)


def _parsed(text: str, allowed: Collection[str]) -> dict[str, float]:
    factors: dict[str, float] = {}
    for part in text.split("+"):
        match = TERM.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"The loss {text!r} cannot be read; join names by +, with a factor if there is one, such as "
                "cross_entropy + 0.5 * dice."
            )
        factor, name = match.groups()
        if name not in allowed:
            raise unknown("loss", name, allowed)
        if name in factors:
            raise ConfigError(f"The loss {text!r} holds {name} twice.")
        factors[name] = 1.0 if factor is None else float(factor)
    return factors
