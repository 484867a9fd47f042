"""Parametrized tests that the fast suite runs for some values, and the slow suite for the others."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Returns the values of a parameter, of which those that are not in `fast` are marked as slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
