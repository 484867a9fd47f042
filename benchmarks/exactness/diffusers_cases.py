"""The models of diffusers, from tiny random configurations.

Not among them are those that cannot be checked on a CPU in float64: FlexAttention has no backward there
(`AnyFlowFARTransformer3DModel`, `LTX2VideoDiffusionDecoderModel`), and `CosmosTransformer3DModel`,
`Kandinsky5Transformer3DModel` and `MotifVideoTransformer3DModel` compute in float32.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
from torch import nn

from benchmarks.exactness.cases import Case, strengthen
from benchmarks.exactness.diffusers_autoencoders import MODELS as AUTOENCODERS
from benchmarks.exactness.diffusers_transformers import MODELS as TRANSFORMERS
from benchmarks.exactness.diffusers_unets import MODELS as UNETS

MODELS = {**AUTOENCODERS, **TRANSFORMERS, **UNETS}
"""Class of diffusers: the arguments that make it, and those of its forward."""


def diffusers_cases() -> list[Case]:
    """Returns all cases."""
    return [
        Case("diffusers", name, partial(_build, name, options), partial(_run, inputs))
        for name, (options, inputs) in MODELS.items()
    ]


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = getattr(diffusers, name)(**options)
    if name == "LuminaNextDiT2DModel":  # its pad_token, which it never reads, is memory that nothing was written to
        nn.init.zeros_(model.get_parameter("pad_token"))
    strengthen(model)
    return model


def _run(inputs: Callable[[], dict[str, Any]], model: nn.Module) -> Any:
    return model(**inputs())
