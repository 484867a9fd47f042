"""Learning-rate schedules by name: the factor on the base rate at a step, as plain functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unknown


def constant(progress: float) -> float:
    """The base rate throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine, from the base rate at progress 0 to nothing at 1 (SGDR without restarts, arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line, from the base rate to nothing."""
    return 1 - progress


def polynomial(progress: float) -> float:
    """The usual decay of segmentation, with the power 0.9 of DeepLab (arXiv 1606.00915)."""
    return (1 - progress) ** 0.9


SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"constant": constant, "cosine": cosine, "linear": linear, "polynomial": polynomial}
)


def factor(step: int, *, schedule: str, total: int, warmup: float) -> float:
    """The factor on the base rate: a straight rise over the share `warmup` of all steps, then the schedule.

    Args:
        step: The optimizer step, from 0.
        schedule: A name in `SCHEDULES`.
        total: The number of steps there will be.
        warmup: Share of the steps that the rise takes, from 0 to 1.
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return SCHEDULES[schedule](min(1.0, (step - rise) / max(1, total - rise)))


def check_schedule(schedule: str, warmup: float) -> None:
    """Refuse a schedule that `scheduler` could not make.

    Raises:
        ConfigError: For an unknown name, or a warm-up that is no share.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if not 0 <= warmup < 1:
        raise ConfigError(f"warmup is {warmup}; it is a share of all steps, from 0 to below 1.")


def scheduler(optimizer: Optimizer, schedule: str, total: int, warmup: float) -> LambdaLR:
    """A torch scheduler, to be stepped after each optimizer step."""
    return LambdaLR(optimizer, partial(factor, schedule=schedule, total=total, warmup=warmup))
