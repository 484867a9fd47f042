"""What a kernel is: a faster way to compute some calls of an operation."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch


@dataclass(frozen=True)
class Kernel:
    """One entry of an operation.

    Args:
        name: Of the file in `entries` that defines it. It is what switches the kernel off.
        operation: Name of the operation that it computes.
        available: Says why it cannot be used on this machine; empty if it can.
        applies: Says whether it computes a call, from the arguments of that call.
        run: Computes a call.
    """

    name: str
    operation: str
    available: Callable[[], str]
    applies: Callable[..., bool]
    run: Callable[..., Any]


def missing_from_torch(*names: str) -> str:
    """Says which private name of torch, such as `_C._get_mkldnn_enabled`, is missing; empty if all are there."""
    for name in names:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            return f"torch {torch.__version__} has no torch.{name}"
    return ""
