"""Handwritten digits that need no download: 1797 of 8x8 pixels in 16 gray levels, shipped with scikit-learn.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_plugins.tasks.argument_checks import check_digits
from lora_plugins.tasks.files import TEST, TRAIN, VAL

SHARES = ((TRAIN, 0.0, 0.6), (VAL, 0.6, 0.8), (TEST, 0.8, 1.0))
MAX_INK = 16


@dataclass(frozen=True)
class DigitSamples:
    """Some digits: ink (N, 8, 8) from 0 to 1, their places in the list asked for, and numbers in scikit-learn."""

    ink: Tensor
    labels: Tensor
    numbers: Tensor


def load_digit_splits(digits: Sequence[int]) -> dict[str, DigitSamples]:
    """The samples of these digits in three disjoint splits: train, val and test, 60, 20 and 20 % of each digit.

    The splits are fixed, so a test digit of one run is never a training digit of another.

    Raises:
        ConfigError: If there are no digits, or one is not a digit or occurs twice.
    """
    check_digits("digits", digits)
    rows = np.loadtxt(_file(), delimiter=",")
    ink = torch.from_numpy(rows[:, :-1].reshape(-1, 8, 8)).float() / MAX_INK
    target = rows[:, -1].astype(int)
    order = np.random.default_rng(0).permutation(len(target))
    of_digit = [order[target[order] == digit] for digit in digits]
    return {
        split: _take(ink, [numbers[int(len(numbers) * a) : int(len(numbers) * b)] for numbers in of_digit])
        for split, a, b in SHARES
    }


def _file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads, whose import takes longer than a second."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    return Path(package.origin).parent / "datasets/data/digits.csv.gz"


def _take(ink: Tensor, numbers_by_label: Sequence[np.ndarray[Any, Any]]) -> DigitSamples:
    labels = torch.cat([torch.full((len(n),), label) for label, n in enumerate(numbers_by_label)])
    numbers = torch.from_numpy(np.concatenate(numbers_by_label))
    return DigitSamples(ink[numbers], labels, numbers)
