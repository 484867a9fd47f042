"""Values in nested dictionaries and lists, by the keys that lead to them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

Path = tuple[Any, ...]
"""The keys that lead to a value."""


def changed_at(value: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """Returns a nested value in which `change` was applied to what is at a path, None if nothing is.

    Nothing given is changed. Dictionaries keep their class, and what they know beside their items, as state dicts do.
    """
    if not path:
        return change(value)
    key, *inner = path
    items = copy.copy(value) if isinstance(value, dict) else dict(enumerate(value))
    items[key] = changed_at(items.get(key), inner, change)
    return items if isinstance(value, dict) else type(value)(items.values())
