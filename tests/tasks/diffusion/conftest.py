import importlib.util

import numpy as np
import pytest
from PIL import Image

collect_ignore_glob = [] if importlib.util.find_spec("diffusers") else ["*.py"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def picture_folder(tmp_path):
    """Makes a folder of pictures, each (height, width), without captions."""

    def make(*sizes, name="pictures"):
        folder = tmp_path / name
        folder.mkdir()
        generator = np.random.default_rng(0)
        for number, (height, width) in enumerate(sizes):
            pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        return folder

    return make
