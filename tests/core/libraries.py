"""Layers and functions of libraries that the core does without, for tests that hold it against them.

A test that calls one of them is skipped where the library is not installed, as in an environment of the core alone.
"""

from collections.abc import Callable
from typing import Any

import pytest


def of_library(module: str, name: str) -> Callable[..., Any]:
    """Returns a function or class of a library, which is imported when it is called."""

    def call(*args: Any, **fields: Any) -> Any:
        return getattr(pytest.importorskip(module), name)(*args, **fields)

    return call


Conv1D = of_library("transformers.pytorch_utils", "Conv1D")
Conv2dSame = of_library("timm.layers", "Conv2dSame")
DeformConv2d = of_library("torchvision.ops", "DeformConv2d")
ScaledStdConv2d = of_library("timm.layers", "ScaledStdConv2d")
StdConv2dSame = of_library("timm.layers", "StdConv2dSame")
create_model = of_library("timm", "create_model")
kstest = of_library("scipy.stats", "kstest")
