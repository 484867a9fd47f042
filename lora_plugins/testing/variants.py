"""The conformance kit for variants: one call that checks a plugin."""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch

from lora_plugins.devices import usable_device
from lora_plugins.errors import ConfigError, PluginError
from lora_plugins.plugins import VariantPlugin
from lora_plugins.testing.check import Check, by_name, chosen, elsewhere, run
from lora_plugins.testing.variant_case import LAYERS, VariantCase
from lora_plugins.testing.variant_law import LAW_CHECKS, require_own_names
from lora_plugins.testing.variant_life import LIFE_CHECKS


def _telling_names(check: Callable[[VariantCase], None], case: VariantCase) -> None:
    """Runs a check; if it fails on an unknown name of the variant's own tensors, the message lists the known ones."""
    try:
        check(case)
    except (KeyError, PluginError):
        require_own_names(case)
        raise


VARIANT_CHECKS: dict[str, Check[VariantCase]] = by_name(LAW_CHECKS, LIFE_CHECKS)
"""All checks of a variant by name, in the order they are run."""


def check_variant_plugin(
    variant: VariantPlugin,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    device: str | torch.device = "cpu",
) -> None:
    """Checks a variant on a linear layer, whole and in parts, a grouped convolution and an embedding.

    It need not be installed.

    Args:
        variant: The plugin.
        only: Names of the checks to run; all of `VARIANT_CHECKS` by default.
        skip: Names of checks not to run.
        device: Where it is checked, such as "cuda"; it has to know float64.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check of a name, or torch cannot use the device here, or the variant refuses all of
            these layers; those that it refuses are left out.

    Example:
        >>> from lora_plugins.variants.dora import DoraVariant
        >>> check_variant_plugin(DoraVariant())
    """
    selected, place = chosen(VARIANT_CHECKS, only, skip), usable_device(device)
    cases = [VariantCase(variant, elsewhere(variant), layer, place) for layer in LAYERS]
    refusals = [case.refusal() for case in cases]
    if None not in refusals:
        raise ConfigError(f"{type(variant).__name__} refuses all layers of the kit, as the first one: {refusals[0]}.")
    for case, refusal in zip(cases, refusals, strict=True):
        for check in selected if refusal is None else ():
            told = replace(check, run=partial(_telling_names, check.run))
            run(told, case, f"{type(variant).__name__} on {case.layer}")
