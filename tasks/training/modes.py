"""Modules in eval mode, and tasks on another device, inside a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lora_plugins.inplace import own_mode, set_own_mode
from lora_plugins.utils import ending


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode inside a `with` block, and gives each part its own mode back."""
    modes = {part: own_mode(part) for part in module.modules()}

    def put_back() -> None:
        for part, mode in modes.items():
            set_own_mode(part, mode)

    with ending(put_back):
        module.eval()
        yield


@contextmanager
def evaluated_on(task: LightningModule, device: torch.device | str) -> Iterator[None]:
    """Holds a task on a device and in eval mode inside a `with` block."""
    home = task.device
    with ending(partial(task.to, home)):
        task.to(device)
        with eval_mode(task):
            yield
