"""Parametrized tests that the fast suite runs for some values, and the slow suite for the others."""

from collections.abc import Container, Iterable, Mapping
from itertools import product
from typing import Any

import pytest


def slow_but(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Returns the values of a parameter, of which those that are not in `fast` are marked as slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def thinned(every: int, **axes: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by all combinations of values, of which all but every so many are marked as slow.

    Fast are those whose positions on the axes add up to a multiple. So the fast suite meets each value of an axis where
    another one has `every` values or more, and each pair of values of two axes where a third one has.

    Args:
        every: Of how many combinations one is fast.
        **axes: The values of each argument of the test, by id, or by themselves where these are short.
    """
    named = [_by_id(values) for values in axes.values()]
    cells = [
        pytest.param(
            *(value for _, (_, value) in cell),
            id="-".join(name for _, (name, _) in cell),
            marks=[pytest.mark.slow] if sum(place for place, _ in cell) % every else [],
        )
        for cell in product(*map(enumerate, named))
    ]
    return pytest.mark.parametrize(tuple(axes), cells)


def _by_id(values: Iterable[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [*values.items()] if isinstance(values, Mapping) else [(str(value), value) for value in values]
