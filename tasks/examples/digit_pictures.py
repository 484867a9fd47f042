"""The embedded data of Dreambooth: a few pictures of one digit as a subject, in files like anyone's."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.errors import counted
from lora_plugins.field_checks import check_count, whole_from
from lora_plugins.tasks.argument_checks import check_digit
from lora_plugins.tasks.diffusion import PicturesDataModule
from lora_plugins.tasks.examples.handwritten_digits import load_digit_splits
from lora_plugins.tasks.files import TEST, as_png
from lora_plugins.utils import replace_file


class DigitPicturesDataModule(PicturesDataModule):
    """Pictures of one handwritten digit, which are written into a folder first.

    Args:
        root: The folder; pictures of other things that are there stay, and belong to the subject.
        digit: The digit.
        count: How many pictures.
        seed: Which ones.
        **others: Arguments of `PicturesDataModule`.

    Raises:
        ConfigError: If there are not so many pictures, or the folder has digits of another choice.
    """

    def __init__(self, root: str, digit: int = 9, count: int = 6, seed: int = 0, **others: Any) -> None:
        super().__init__(root, **others)
        check_digit("digit", digit)
        check_count("count", count)
        whole_from(0)("seed", seed)
        self.digit, self.count, self.seed = digit, count, seed

    def prepare_data(self) -> None:
        """Writes the pictures."""
        ink = load_digit_splits([self.digit])[TEST].ink.numpy()
        if not 1 <= self.count <= len(ink):
            raise ConfigError(f"count is {self.count}; there are {len(ink)} pictures of the digit {self.digit}.")
        root = Path(self.root)
        root.mkdir(parents=True, exist_ok=True)
        numbers = np.random.default_rng(self.seed).permutation(len(ink))[: self.count]
        chosen = {root / f"digit-{self.digit}-{number:03d}.png": ink[number] for number in numbers}
        if others := {*root.glob("digit-*.png")} - chosen.keys():
            raise ConfigError(
                f"{root} has {counted(len(others), 'picture')} of another digit, count or seed, such as "
                f"{min(others).name}, which would be learned as well. Delete them, or give another root."
            )
        for path, picture in chosen.items():
            replace_file(path, as_png(Image.fromarray((picture * 255).round().astype(np.uint8))))
