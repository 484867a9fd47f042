"""Options that LoraCallbacks of one trainer share, so that they have to be the same."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback

from lora_plugins import ConfigError


def check_shared(options: Iterable[str], callbacks: Sequence[Callback], why: str) -> None:
    """Checks that LoraCallbacks have the same values of options; `why` says which they are and why they share them.

    Raises:
        ConfigError: If values differ, naming them.
    """
    for option in options:
        given = [(each[option], each["adapter_name"]) for each in map(_options, callbacks)]
        if len({value for value, _ in given}) > 1:
            told = ", ".join(f"{value!r} of {name!r}" for value, name in given)
            raise ConfigError(f"LoraCallbacks {why}, and {option} differs: {told}. Use one value.")


def _options(callback: Callback) -> dict[str, Any]:
    own = vars(callback)
    return {**own, **vars(own["rates"])}  # which are options too: loraplus_lr_ratio, heads_lr_ratio
