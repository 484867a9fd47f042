"""Small synthetic data, the same each time."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def folder_until_exit() -> Path:
    """Makes a folder that is removed when Python ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Made(Dataset):
    """Items that a function makes of their number."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.items = [make(at) for at in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> Any:
        return self.items[at]


def loader(make: Callable[[int], Any], count: int = 8, batch_size: int = 4, collate: Any = None) -> DataLoader:
    """Returns a loader of items that are made of their number."""
    return DataLoader(Made(make, count), batch_size=batch_size, collate_fn=collate, num_workers=0)


def image(channels: int = 3, size: int = 32) -> torch.Tensor:
    """Returns one picture of random values between 0 and 1."""
    return torch.rand(channels, size, size)
