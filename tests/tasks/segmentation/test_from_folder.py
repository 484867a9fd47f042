"""Images and masks in folders."""

import numpy as np
import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    MaskFolderDataModule,
)

from ..conftest import loaded, noise, write_image

CLASSES = ["sky", "road", "tree"]


class TestMaskFolders:
    def make(self, folder, **changes):
        return MaskFolderDataModule(str(folder), classes=CLASSES, image_size=(20, 24), augmentation="none", **changes)

    def test_samples_hold_the_pixels_of_the_files(self, mask_folders):
        from PIL import Image

        sample = loaded(self.make(mask_folders)).splits["val"][1]
        mask = np.asarray(Image.open(mask_folders / "masks" / "val" / "1.png"))
        image = np.asarray(Image.open(mask_folders / "images" / "val" / "1.jpg"))
        assert np.array_equal(sample["target"].numpy(), mask)
        assert np.allclose(sample["image"].numpy() * 255, image.transpose(2, 0, 1), atol=1e-3)
        assert type(sample["image"]) is type(sample["target"]) is torch.Tensor

    def test_masks_are_resized_without_blending(self, mask_folders):
        data = MaskFolderDataModule(str(mask_folders), classes=CLASSES, image_size=(33, 17))
        data.setup("fit")
        assert data.splits["val"][0]["target"].shape == (33, 17)
        assert set(data.splits["val"][0]["target"].unique().tolist()) == {0, 1, 2, 255}

    def test_an_unknown_augmentation(self, mask_folders):
        with pytest.raises(ConfigError, match="Did you mean 'flip'"):
            MaskFolderDataModule(str(mask_folders), classes=CLASSES, augmentation="flp")

    def test_unpaired_files_are_all_listed(self, mask_folders):
        (mask_folders / "masks" / "train" / "0.png").rename(mask_folders / "masks" / "train" / "zero.png")
        (mask_folders / "images" / "train" / "3.jpg").unlink()
        with pytest.raises(DataError, match="3 problems") as error:
            loaded(self.make(mask_folders))
        assert "images/train/0.jpg has no mask" in str(error.value)
        assert "masks/train/zero.png has no image" in str(error.value)
        assert "masks/train/3.png has no image" in str(error.value)

    def test_values_out_of_range_are_all_listed(self, mask_folders):
        for i in (0, 2):
            write_image(mask_folders / "masks" / "train" / f"{i}.png", np.full((20, 24), 7 + i, dtype=np.uint8))
        with pytest.raises(DataError, match="2 problems") as error:
            loaded(self.make(mask_folders))
        assert "0.png holds 7; allowed are 0 to 2, and 255" in str(error.value)
        assert "2.png holds 9" in str(error.value)

    def test_the_check_of_values_can_be_left_out(self, mask_folders):
        write_image(mask_folders / "masks" / "train" / "0.png", np.full((20, 24), 7, dtype=np.uint8))
        loaded(self.make(mask_folders, check_files=False))

    def test_another_ignore_index(self, mask_folders):
        with pytest.raises(DataError, match="holds 255; allowed are 0 to 2, and 254"):
            loaded(self.make(mask_folders, ignore_index=254))

    def test_a_mask_of_another_size(self, mask_folders):
        write_image(mask_folders / "masks" / "val" / "1.png", np.zeros((10, 12), dtype=np.uint8))
        with pytest.raises(DataError, match=r"1\.png is 10x12, its image is 20x24"):
            loaded(self.make(mask_folders))

    def test_a_color_mask(self, mask_folders):
        write_image(mask_folders / "masks" / "val" / "1.png", noise())
        with pytest.raises(DataError, match=r"1\.png has the mode RGB; .*one class index a pixel"):
            loaded(self.make(mask_folders))

    def test_two_images_of_one_name(self, mask_folders):
        write_image(mask_folders / "images" / "train" / "0.png", noise())
        with pytest.raises(DataError, match="of one name") as error:
            loaded(self.make(mask_folders))
        assert "0.jpg" in str(error.value)
        assert "0.png" in str(error.value)

    def test_an_empty_folder(self, mask_folders):
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            for i in range(2):
                (mask_folders / kind / "val" / f"{i}.{suffix}").unlink()
        with pytest.raises(DataError, match="images/val holds no image"):
            loaded(self.make(mask_folders))

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_missing_split_of_which_no_share_is_held_out(self, mask_folders, split):
        (mask_folders / "images" / split).rename(mask_folders / "images" / "other")
        with pytest.raises(DataError, match=f"no folder .*images/{split}"):
            loaded(self.make(mask_folders))

    def test_missing_masks_folder(self, mask_folders):
        (mask_folders / "masks").rename(mask_folders / "labels")
        with pytest.raises(DataError, match=r"no folder .*masks"):
            loaded(self.make(mask_folders))
