"""Optimizers by name, over the parameters that require gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn, optim

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unknown

OPTIMIZERS: Mapping[str, type[optim.Optimizer]] = MappingProxyType(
    {
        "adamw": optim.AdamW,
        "adam": optim.Adam,
        "nadam": optim.NAdam,
        "radam": optim.RAdam,
        "rmsprop": optim.RMSprop,
        "sgd": optim.SGD,
    }
)
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"sgd": {"momentum": 0.9}})


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Refuse, before anything is built, an optimizer that could not be made.

    Raises:
        ConfigError: For an unknown name, or options that it does not take.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    make_optimizer(name, [nn.Parameter()], lr=1.0, weight_decay=0.0, options=options)


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, options: Mapping[str, Any]
) -> optim.Optimizer:
    """Make an optimizer by its name in `OPTIMIZERS`.

    Raises:
        ConfigError: For options that it does not take.
    """
    keywords = {**DEFAULTS.get(name, {}), **options}
    try:
        return OPTIMIZERS[name](list(parameters), lr=lr, weight_decay=weight_decay, **keywords)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The optimizer {name} does not take the options {dict(options)}: {error}") from error
