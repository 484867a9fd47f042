"""The state of torch's random numbers in a checkpoint, so that shuffling and dropout go on as they would have."""

from collections.abc import Mapping
from typing import Any

import torch


def random_numbers() -> dict[str, Any]:
    """Returns the states of the generators of the CPU and of the current GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"random": torch.get_rng_state(), "random_cuda": cuda}


def set_random_numbers(state: Mapping[str, Any]) -> None:
    """Sets the generators to what `random_numbers` returned."""
    torch.set_rng_state(state["random"].cpu())
    if state["random_cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"].cpu())
