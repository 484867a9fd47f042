"""What arguments of tasks and data modules can hold: checks beside those that a `LoraConfig` has as well."""

import math
from collections.abc import Mapping
from typing import Any

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import Check, shown


def check_arguments(given: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Checks arguments by name.

    Raises:
        ConfigError: For the first one that is wrong.
    """
    for name, check in checks.items():
        check(name, given[name])


def number_from(least: float, below: float = math.inf) -> Check:
    """A finite number, at least one and below another."""

    def check_number(name: str, value: Any) -> None:
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or not least <= number < below:
            upper = "" if below == math.inf else f", below {below:g}"
            raise ConfigError(f"{name} is a finite number{_from(least)}{upper}, not {shown(value)}.")

    return check_number


def whole_from(least: float) -> Check:
    """A whole number, at least one."""

    def check_whole(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is a whole number{_from(least)}, not {shown(value)}.")

    return check_whole


def _from(least: float) -> str:
    return "" if least == -math.inf else f" of at least {least:g}"


check_whole = whole_from(-math.inf)


def check_size(name: str, value: Any) -> None:
    """Height and width of images."""
    sides = value if isinstance(value, list | tuple) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise ConfigError(f"{name} is height and width in pixels, such as (224, 224), not {shown(value)}.")


def check_callable(name: str, value: Any) -> None:
    """What is called to make something."""
    if not callable(value):
        raise ConfigError(
            f"{name} is {shown(value)}. It is called to make one: a class, or functools.partial of it. In YAML, give "
            "its class_path."
        )


def check_texts(name: str, value: Any) -> None:
    """A list of texts, one at least."""
    texts = value if isinstance(value, list | tuple) else ()
    if not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
        raise ConfigError(f"{name} is {shown(value)}; give a list of at least one text, and no empty one.")
