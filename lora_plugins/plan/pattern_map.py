"""Values of single layers by pattern, as `rank_pattern` and `alpha_pattern` have them: the most specific one counts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from lora_plugins.errors import TargetError
from lora_plugins.plan.patterns import compiled, is_literal, nearest, spellings
from lora_plugins.utils import path_ends, path_runs

Value = TypeVar("Value")


class PatternMap(Generic[Value]):
    """Values of single layers by pattern, such as `rank_pattern`.

    Args:
        field: Name of the field, for errors.
        values: The patterns and their values.
        names: The names of all adapted layers.
        at_end: Whether a path that ends the name of a layer means that layer alone, and not those below it.

    Raises:
        TargetError: If a pattern matches none of the names.
    """

    def __init__(self, field: str, values: Mapping[str, Value], names: Iterable[str], *, at_end: bool = False) -> None:
        self._field = field
        self._values = values
        names = list(names)
        ends = {end for name in names for end in path_ends(name)} if at_end else set()
        self._at_end: dict[str, list[str]] = {}
        self._inside: dict[str, list[str]] = {}
        self._expressions: dict[str, re.Pattern[str]] = {}
        for key in values:
            is_end = not ends.isdisjoint(spellings(key))
            if is_end or is_literal(key):
                for each in spellings(key):
                    (self._at_end if is_end else self._inside).setdefault(each, []).append(key)
            else:
                self._expressions[key] = compiled(field, key if key.startswith("^") else rf"(?:.*\.)?(?:{key})")
        matched = {key for name in names for key in self._keys(name)}
        for key in values:
            if key not in matched:
                raise TargetError(f"{field}: {key!r} matches none of the adapted layers. {nearest(key, names)}")

    def _keys(self, name: str) -> set[str]:
        """Returns the patterns that match a name."""
        found = {key for key, expression in self._expressions.items() if expression.fullmatch(name)}
        for index, parts in ((self._at_end, path_ends(name)), (self._inside, path_runs(name))):
            found.update(key for part in parts for key in index.get(part, ()))
        return found

    def get(self, names: Sequence[str], default: Value) -> Value:
        """Returns the value of the most specific pattern that matches one of a layer's names, or else the default.

        Raises:
            TargetError: If two patterns match equally well.
        """
        found = sorted((-_specificity(key), key) for key in {key for name in names for key in self._keys(name)})
        if not found:
            return default
        best = [key for specificity, key in found if specificity == found[0][0]]
        if len(best) > 1:
            raise TargetError(
                f"{self._field}: {best[0]!r} and {best[1]!r} match the layer {names[0]!r} equally well. "
                "Make one of them longer; the full name of the layer always wins."
            )
        return self._values[best[0]]


def _specificity(key: str) -> int:
    """Returns the number of path components of a literal key; 0 for a regular expression."""
    return key.count(".") + 1 if is_literal(key) else 0
