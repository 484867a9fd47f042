"""Tensors that are made in inference mode, which autograd refuses for ever after."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lets a function that changes a model leave inference mode, in which its caller may be."""

    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return function(*args, **kwargs)

    return wrapper
