"""Values in nested dictionaries and lists, by the keys that lead to them."""

from collections.abc import Callable, Sequence
from typing import Any

Path = tuple[Any, ...]
"""The keys that lead to a value."""


def changed_at(value: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """Returns a nested value in which `change` was applied to what is at a path; nothing given is changed."""
    if not path:
        return change(value)
    key, *inner = path
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    items[key] = changed_at(items[key], inner, change)
    return items if isinstance(value, dict) else type(value)(items.values())
