"""Modules in eval mode, and tasks on another device, inside a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode inside a `with` block, and gives each part its own mode back."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def evaluated_on(task: LightningModule, device: torch.device | str) -> Iterator[None]:
    """Holds a task on a device and in eval mode inside a `with` block."""
    home = task.device
    task.to(device)
    try:
        with eval_mode(task):
            yield
    finally:
        task.to(home)
