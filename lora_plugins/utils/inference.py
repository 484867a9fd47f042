"""The modes of autograd around what changes a model."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a function that changes a model run outside of inference mode, and restores the mode of gradients after it.

    Autograd never takes a tensor that was made in inference mode. And an interruption at the end of a
    `with torch.no_grad():` can come before gradients are on again.
    """

    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled()), inference:
            return function(*args, **kwargs)

    return wrapper
