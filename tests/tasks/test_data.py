"""Data modules: what they give, and what they refuse before training."""

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    DigitScenesDataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    MaskFolderDataModule,
)
from lora_plugins.tasks.data import AUGMENTATIONS, IMAGES_ONLY, Batch, image_transform
from lora_plugins.tasks.examples import load_digit_splits

from .conftest import noise, write_image

CLASSES = ["sky", "road", "tree"]


def loaded(data):
    data.setup("fit")
    return data


class TestDigits:
    def test_every_digit_is_in_exactly_one_split(self):
        splits = load_digit_splits(range(10))
        numbers = torch.cat([split.numbers for split in splits.values()])
        assert sorted(numbers.tolist()) == list(range(1797))

    def test_the_split_of_a_digit_does_not_depend_on_which_digits_are_asked_for(self):
        few, all_of_them = load_digit_splits([7]), load_digit_splits(range(10))
        assert set(few["test"].numbers.tolist()) < set(all_of_them["test"].numbers.tolist())

    def test_labels_follow_the_order_of_the_digits(self):
        from sklearn.datasets import load_digits

        train = load_digit_splits([8, 3])["train"]
        truth = torch.from_numpy(load_digits().target)[train.numbers]
        assert torch.equal(torch.tensor([8, 3])[train.labels], truth)

    @pytest.mark.parametrize("digits", [[], [1, 1], [10]], ids=["none", "twice", "no digit"])
    def test_wrong_digits(self, digits):
        with pytest.raises(ConfigError, match="0 to 9, each once"):
            loaded(DigitsDataModule(digits))

    def test_samples(self):
        data = loaded(DigitsDataModule([4, 5], image_size=12))
        sample = data.splits["train"][0]
        assert sample["image"].shape == (3, 12, 12)
        assert 0 <= sample["image"].min() < 0.1
        assert 0.9 < sample["image"].max() <= 1
        assert sample["name"].startswith("digit number ")
        assert data.class_names == ["4", "5"]

    def test_polarity_and_turn(self):
        plain = loaded(DigitsDataModule([4]))
        turned = loaded(DigitsDataModule([4], dark_on_light=True, quarter_turns=1))
        light, dark = plain.splits["val"][0]["image"], turned.splits["val"][0]["image"]
        torch.testing.assert_close(torch.rot90(1 - light, 1, (1, 2)), dark, atol=1 / 255, rtol=0)


class TestScenes:
    def make(self, **changes):
        small = {"digits": [2, 6], "train_scenes": 3, "val_scenes": 2, "test_scenes": 0}
        return loaded(DigitScenesDataModule(**(small | changes)))

    def test_samples(self):
        data = self.make()
        sample = data.splits["train"][2]
        assert sample["image"].shape == (3, 64, 64)
        assert sample["target"].shape == (64, 64)
        assert set(sample["target"].unique().tolist()) <= {0, 1, 2}
        assert sample["name"] == "train scene 2"
        assert data.class_names == ["ground", "2", "6"]
        assert list(data.splits) == ["train", "val"]

    def test_the_same_arguments_give_the_same_scenes(self):
        one, two = self.make(), self.make(val_scenes=5)
        assert torch.equal(one.splits["train"].images, two.splits["train"].images)
        assert torch.equal(one.splits["val"].images, two.splits["val"].images[:2])
        assert not torch.equal(one.splits["train"].images, self.make(seed=1).splits["train"].images)

    def test_ink_lies_where_the_mask_says(self):
        sample = self.make().splits["train"][0]
        ink = sample["image"].mean(0)
        assert ink[sample["target"] > 0].mean() > ink[sample["target"] == 0].mean() + 0.3

    def test_a_digit_larger_than_the_canvas(self):
        with pytest.raises(ConfigError, match="at most canvas=16"):
            DigitScenesDataModule(canvas=16)


class TestImageFolders:
    def test_samples(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), image_size=(8, 16), batch_size=3))
        assert data.class_names == ["cat", "dog"]
        batch = Batch.read(next(iter(data.val_dataloader())))
        assert batch.images.shape == (3, 3, 8, 16)
        assert batch.targets.tolist() == [0, 0, 1]
        assert batch.names[2] == str(class_folders / "val" / "dog" / "0.jpg")

    def test_train_is_shuffled_and_prediction_reads_val(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), image_size=(8, 8)))
        assert len(data.train_dataloader().dataset) == 8
        assert len(data.predict_dataloader().dataset) == 4
        with pytest.raises(DataError, match="has no test split, only train, val"):
            data.test_dataloader()

    def test_a_missing_root_names_its_neighbors(self, class_folders):
        with pytest.raises(DataError, match="Did you mean 'data'"):
            loaded(ImageFolderDataModule(str(class_folders.parent / "dato")))

    def test_a_missing_split(self, class_folders):
        (class_folders / "val").rename(class_folders / "valid")
        with pytest.raises(DataError, match=r"no folder .*val\. .*Did you mean 'valid'"):
            loaded(ImageFolderDataModule(str(class_folders)))

    def test_all_wrong_folders_are_listed(self, class_folders):
        (class_folders / "val" / "horse").mkdir()
        with pytest.raises(DataError) as error:
            loaded(ImageFolderDataModule(str(class_folders)))
        assert "val/horse holds no image" in str(error.value)
        assert "val/horse is no class of" in str(error.value)

    def test_a_broken_picture_is_named(self, class_folders):
        path = class_folders / "train" / "cat" / "0.jpg"
        path.write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"cat.0\.jpg cannot be read"):
            loaded(ImageFolderDataModule(str(class_folders))).splits["train"][0]


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

    @pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name not in IMAGES_ONLY])
    def test_augmentations_move_mask_and_image_together(self, name):
        from torchvision import tv_tensors

        left = np.zeros((16, 16, 3), dtype=np.uint8)
        left[:, :8] = 255
        mask = tv_tensors.Mask(torch.from_numpy(left[..., 0] // 255).long())
        for _ in range(8):
            image, moved = image_transform((16, 16), name)(left, mask)
            grown, shrunk = (sign * max_pool2d(sign * moved[None].float(), 5, 1, 2)[0] for sign in (1, -1))
            inside = grown == shrunk  # away from the edge, where an enlarged image is blended
            inside[[0, 1, -1, -2]] = inside[:, [0, 1, -1, -2]] = False  # a turned image is blended with what is around
            assert ((image[0] > 0.42) == (moved == 1))[inside].all()

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

    def test_missing_masks_folder(self, mask_folders):
        (mask_folders / "masks").rename(mask_folders / "labels")
        with pytest.raises(DataError, match=r"no folder .*masks"):
            loaded(self.make(mask_folders))
