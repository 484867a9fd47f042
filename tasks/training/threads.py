"""How many threads torch computes with on the CPU, for a run."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_plugins import ConfigError


class CpuThreads(Callback):
    """Sets the number of threads with which torch computes on the CPU, and puts it back after the run.

    A network as small as those of the shipped examples has nothing to share out: its threads mostly wait for each
    other, and where other programs want the same cores a run can take many times longer than with one thread.

    Args:
        threads: The number of threads.

    Raises:
        ConfigError: For a number below 1.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ConfigError(f"threads is {threads}; at least one has to compute.")
        self.threads = threads
        self._before: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the number."""
        if self._before is None:
            self._before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put it back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put it back; after an error Lightning does not call `teardown`."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
