"""The conformance kit for inits: one call that checks a plugin over its options."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lora_plugins.errors import ConfigError, near
from lora_plugins.plugins import InitPlugin
from lora_plugins.testing.check import Check, by_name, chosen, each_of, elsewhere, run
from lora_plugins.testing.init_base import BASE_CHECKS
from lora_plugins.testing.init_case import LAYERS, InitCase
from lora_plugins.testing.init_start import START_CHECKS

INIT_CHECKS: dict[str, Check[InitCase]] = by_name(START_CHECKS, BASE_CHECKS)
"""All checks of an init by name, in the order they are run."""


def check_init_plugin(
    init: InitPlugin,
    options: Iterable[Mapping[str, Any]] = ({},),
    *,
    r: int = 4,
    layers: Sequence[str] | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Checks an init over its options; it need not be registered or installed.

    It starts a small model of an embedding, a linear layer and a convolution. An init that `needs` data gets some.

    Args:
        init: The plugin.
        options: The `init_options` to check, one after another.
        r: The rank.
        layers: Which of `embedding`, `linear` and `conv2d` to start; by default all, and for an init that needs inputs
            all but the embedding, whose indices are no vectors.
        only: Names of the checks to run; all of `INIT_CHECKS` by default.
        skip: Names of checks not to run.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check or layer of a name, or the options are one mapping.

    Example:
        >>> from lora_plugins.inits.gaussian import GaussianInit
        >>> check_init_plugin(GaussianInit())
    """
    default = [name for name in LAYERS if name != "embedding" or init.needs != "inputs"]
    started = tuple(default if layers is None else layers)
    for name in started:
        if name not in LAYERS:
            raise ConfigError(f"The kit has no layer {name!r}. {near(name, LAYERS)}")
    selected = chosen(INIT_CHECKS, only, skip)
    for each in each_of(options):
        case = InitCase(init, elsewhere(init), dict(each), r, started)
        subject = f"{type(init).__name__}{f' with {dict(each)}' if each else ''}"
        for check in selected:
            run(check, case, subject)
