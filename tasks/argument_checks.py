"""What arguments of tasks and data modules can hold: checks beside those that a `LoraConfig` has as well."""

from typing import Any

from lora_plugins.errors import ConfigError
from lora_plugins.field_checks import shown


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
