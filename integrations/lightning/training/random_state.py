"""The state of torch's random numbers in a checkpoint, so that shuffling and dropout go on as they would have."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import Trainer

from lora_plugins.devices import default_device
from lora_plugins.utils import random_module


def random_numbers() -> dict[str, Any]:
    """Returns the states of the generators of the CPU and of the current accelerator, where there is one."""
    return {"random": torch.get_rng_state(), **{key: module.get_rng_state() for key, module in _beside().items()}}


def set_random_numbers(state: Mapping[str, Any]) -> None:
    """Sets the generators to what `random_numbers` returned."""
    torch.set_rng_state(state["random"].cpu())
    for key, module in _beside().items():
        if state.get(key) is not None:
            module.set_rng_state(state[key].cpu())


def _beside() -> dict[str, Any]:
    """Returns torch's module of the current accelerator by the key of its state, which no other kind can read."""
    device = default_device()
    module = random_module(device)
    return {} if module is None else {f"random_{device.type}": module}


class ResumedState:
    """What `state_dict` of a LoraCallback left in the checkpoint that a run goes on from, until the first batch.

    Its random numbers are set wherever those of a run without a break would be the same.
    """

    def __init__(self, state: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._state: Mapping[str, Any] = dict(state)  # a proxy cannot be pickled, as a callback is
        self._after_data: Mapping[str, Any] = {}

    @property
    def rates(self) -> Mapping[str, float]:
        """The ratios of learning rates, by name."""
        found: Mapping[str, float] = self._state.get("rates", {})
        return found

    def set(self, trainer: Trainer) -> None:
        """Sets the random numbers, also ahead of `estimated_stepping_batches`, which sets up the data."""
        if self._state and trainer.world_size == 1:  # the file has those of the first process only
            set_random_numbers(self._state)

    def set_before_data(self, trainer: Trainer) -> None:
        """As `set`, unless there are iterators over the data, which have drawn from the restored numbers."""
        if trainer.train_dataloader is None:
            self.set(trainer)
        else:
            self.note_after_data(trainer)

    def note_after_data(self, trainer: Trainer) -> None:
        """Notes the random numbers that the iterators have left."""
        if self._state and not self._after_data and trainer.world_size == 1:
            self._after_data = random_numbers()

    def set_after_data(self) -> None:
        """Sets the noted ones again, whatever hooks have drawn since: a run without a break does not call them here."""
        if self._after_data:
            set_random_numbers(self._after_data)

    def forget(self) -> None:
        """Forgets the state, except for what was noted."""
        self._state = {}
