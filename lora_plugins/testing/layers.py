"""The conformance kit for layer types: one call that checks a plugin over the options of its layer."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_plugins.devices import usable_device
from lora_plugins.plugins import LayerPlugin
from lora_plugins.testing.check import Check, by_name, chosen, each_of, run
from lora_plugins.testing.layer_answers import ANSWER_CHECKS
from lora_plugins.testing.layer_calls import CALL_CHECKS
from lora_plugins.testing.layer_case import LayerCase
from lora_plugins.testing.layer_dropout import DROPOUT_CHECKS
from lora_plugins.testing.layer_dtypes import DTYPE_CHECKS
from lora_plugins.testing.layer_law import LAW_CHECKS
from lora_plugins.testing.layer_life import LIFE_CHECKS

LAYER_CHECKS: dict[str, Check[LayerCase]] = by_name(
    LAW_CHECKS, DROPOUT_CHECKS, ANSWER_CHECKS, CALL_CHECKS, DTYPE_CHECKS, LIFE_CHECKS
)
"""All checks of a layer plugin by name, in the order they are run."""


def check_layer_plugin(
    plugin: LayerPlugin[Any],
    build: Callable[..., nn.Module],
    inputs: Callable[[Any], Any],
    options: Iterable[Mapping[str, Any]] = ({},),
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    compile_backend: str | None = "eager",
    device: str | torch.device = "cpu",
) -> None:
    """Checks a layer plugin over the options of its layer; it need not be registered or installed.

    Args:
        plugin: The plugin.
        build: Makes an untouched layer, small, called with each of the options as keywords; often its class.
        inputs: Makes what the layer is called with, given the layer: a tensor, a tuple of arguments, or all of them by
            name for a layer that takes some by keyword alone. Floating tensors are cast to the layer's type.
        options: The options of the layer to check, one after another.
        only: Names of the checks to run; all of `LAYER_CHECKS` by default.
        skip: Names of checks not to run.
        compile_backend: The backend of torch.compile to check with; None leaves compiling out.
        device: Where layer and inputs are moved, such as "cuda"; it has to know float64.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check of a name, the options are one mapping, or torch cannot use the device here.

    Example:
        >>> from torch import nn
        >>> from lora_plugins.layers.linear import LinearPlugin
        >>> check_layer_plugin(
        ...     LinearPlugin(),
        ...     lambda **options: nn.Linear(4, 3, **options),
        ...     lambda layer: torch.randn(2, 4),
        ...     options=[{}, {"bias": False}],
        ... )
    """
    checks, place = chosen(LAYER_CHECKS, only, skip), usable_device(device)
    for each in each_of(options):
        for checked, what in _uses(plugin):
            case = LayerCase(checked, build, inputs, dict(each), compile_backend, place)
            subject = f"{type(plugin).__name__}{f' with {dict(each)}' if each else ''}{what}"
            for check in checks:
                run(check, case, subject)


def _uses(plugin: LayerPlugin[Any]) -> Sequence[tuple[LayerPlugin[Any], str]]:
    """Returns the plugin, and one that always uses a branch which otherwise only random numbers would show."""
    if plugin.branch_use != "dropout":
        return [(plugin, "")]
    eager = copy.copy(plugin)
    vars(eager)["branch_use"] = "always"
    return [(plugin, ""), (eager, " with its branch in each call")]
