"""Eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(task: nn.Module) -> Iterator[None]:
    """Puts a task into eval mode inside a `with` block; the mode of every module is restored."""
    training = {module: module.training for module in task.modules()}
    task.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
