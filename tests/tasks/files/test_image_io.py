"""Images are rotated as their EXIF orientation says."""

import numpy as np
import pytest
from PIL import Image

from lora_plugins.tasks import (
    HubImageDataModule,
    MaskFolderDataModule,
)

from ..conftest import loaded, write_image


def held_on_its_side(path):
    """A picture that is 20 high and 10 wide when it is shown: dark above, light below."""
    shown = np.zeros((20, 10, 3), dtype=np.uint8)
    shown[10:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown, what is stored has to be turned by a quarter, clockwise
    Image.fromarray(np.rot90(shown)).save(path, exif=exif)


def is_upright(image):
    return image.shape == (3, 20, 10) and bool(image[:, :8].max() < 0.1) and bool(image[:, 12:].min() > 0.9)


class TestPicturesOnTheirSide:
    def test_files(self, mask_folders):
        held_on_its_side(mask_folders / "images" / "val" / "0.jpg")
        write_image(mask_folders / "masks" / "val" / "0.png", np.zeros((20, 10), dtype=np.uint8))
        data = loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(20, 10)))
        assert is_upright(data.splits["val"][0]["image"])

    def test_hugging_face(self, tmp_path):
        pytest.importorskip("datasets")
        for split in ("train", "validation"):
            for name in ("cat", "dog"):
                (tmp_path / "data" / split / name).mkdir(parents=True)
                held_on_its_side(tmp_path / "data" / split / name / "0.jpg")
        data = loaded(HubImageDataModule(str(tmp_path / "data"), image_size=(20, 10)))
        assert data.class_names == ["cat", "dog"]
        assert is_upright(data.splits["val"][0]["image"])
