"""The state of torch's random numbers in a checkpoint, so that shuffling and dropout go on as they would have."""

from collections.abc import Mapping
from typing import Any

import torch

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
