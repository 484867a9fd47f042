"""Optimizers and schedulers, by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import optim
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

Group = dict[str, Any]

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "AdamW": optim.AdamW,
    "SGD": partial(optim.SGD, momentum=0.9, nesterov=True),
    "AMSGrad": partial(optim.Adam, amsgrad=True),
    "RMSprop": optim.RMSprop,
    "Adagrad": optim.Adagrad,
    "NAdam": optim.NAdam,
    "Adamax": optim.Adamax,
    "RAdam": optim.RAdam,
    "Adafactor": optim.Adafactor,
    "fused": partial(optim.AdamW, fused=True),
    "LBFGS": lambda groups, lr: optim.LBFGS(groups, lr=3 * lr, max_iter=3),
}


def each_step(scheduler: Any, **options: Any) -> dict[str, Any]:
    """What Lightning steps after each step of the optimizer."""
    return {"scheduler": scheduler, "interval": "step", **options}


def plateau(optimizer: Optimizer) -> dict[str, Any]:
    """A scheduler that follows a metric."""
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.3, threshold=0.5)
    return {"scheduler": scheduler, "monitor": "val", "strict": False}


def one_cycle(optimizer: Optimizer) -> dict[str, Any]:
    """A scheduler that sets momentum too, where there is one."""
    peaks = [2 * group["lr"] for group in optimizer.param_groups]
    cycles = any(key in optimizer.param_groups[0] for key in ("momentum", "betas")) and not isinstance(
        optimizer, optim.RMSprop
    )
    return each_step(schedulers.OneCycleLR(optimizer, peaks, total_steps=60, cycle_momentum=cycles))


def sequence(optimizer: Optimizer) -> dict[str, Any]:
    """A warm-up, then a cosine."""
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 20)]
    return each_step(schedulers.SequentialLR(optimizer, parts, milestones=[3]))


SCHEDULERS: Mapping[str, Callable[[Optimizer], Any]] = {
    "none": lambda _: None,
    "step": lambda optimizer: schedulers.StepLR(optimizer, 1, 0.5),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 6),
    "exponential": lambda optimizer: each_step(schedulers.ExponentialLR(optimizer, 0.9)),
    "lambda": lambda optimizer: each_step(schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)), frequency=2),
    "plateau": plateau,
    "one cycle": one_cycle,
    "sequence": sequence,
    "restarts": lambda optimizer: each_step(schedulers.CosineAnnealingWarmRestarts(optimizer, 4)),
}
