"""Augmentations, and the preprocessing of the model."""

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d
from torchvision import tv_tensors

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    ImageClassificationTask,
    ImageFolderDataModule,
    MaskFolderDataModule,
)
from lora_plugins.tasks.data import AUGMENTATIONS, IMAGES_ONLY, image_transform

from ..conftest import loaded, tiny_vit


class TestAugmentations:
    @pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name not in IMAGES_ONLY])
    def test_augmentations_move_mask_and_image_together(self, name):
        left = np.zeros((16, 16, 3), dtype=np.uint8)
        left[:, :8] = 255
        mask = tv_tensors.Mask(torch.from_numpy(left[..., 0] // 255).long())
        for _ in range(8):
            image, moved = image_transform((16, 16), name)(left, mask)
            grown, shrunk = (sign * max_pool2d(sign * moved[None].float(), 5, 1, 2)[0] for sign in (1, -1))
            inside = grown == shrunk  # away from the edge, where an enlarged image is blended
            inside[[0, 1, -1, -2]] = inside[:, [0, 1, -1, -2]] = False  # a turned image is blended with what is around
            assert ((image[0] > 0.42) == (moved == 1))[inside].all()

    @pytest.mark.parametrize(("ignored", "filled"), [(7, 7), (None, 255)])
    def test_what_a_rotation_leaves_empty_is_not_counted(self, ignored, filled):
        image, mask = np.zeros((16, 16, 3), dtype=np.uint8), tv_tensors.Mask(torch.ones(16, 16, dtype=torch.long))
        rotated = image_transform((16, 16), "strong", masks=True, ignore_index=ignored)
        found = torch.cat([rotated(image, mask)[1].flatten() for _ in range(8)])
        assert found.unique().tolist() == [1, filled]

    @pytest.mark.parametrize("size", [(16, 16), (24, 40), (128, 144)], ids=["smaller", "less", "larger"])
    @pytest.mark.parametrize("name", ["none", "crop_flip"])
    def test_a_resized_mask_lies_where_its_image_does(self, name, size):
        """Its labels are those nearest to the centers of pixels."""
        disc = sum((torch.arange(64) - 31.5).square().view(shape) for shape in ((-1, 1), (1, -1))) < 400
        pixels, mask = (255 * disc).to(torch.uint8).expand(3, -1, -1), tv_tensors.Mask(disc.long())
        for seed in range(4):
            torch.manual_seed(seed)
            image, moved = image_transform(size, name)(tv_tensors.Image(pixels), mask)
            off = center(image[0]) - center(moved.float())
            assert off.abs().max() < 0.2  # an eighth for a quarter of the size; corners are off by up to 0.6


def center(shown):
    """The mean row and column of what is not 0."""
    places = torch.meshgrid(*map(torch.arange, shown.shape), indexing="ij")
    return torch.stack([(shown * place).sum() for place in places]) / shown.sum()


class TestPreprocessing:
    def test_the_size_is_that_of_the_model(self, trainer, class_folders):
        task, data = ImageClassificationTask(tiny_vit(2)), ImageFolderDataModule(str(class_folders))
        trainer().fit(task, datamodule=data)
        assert data.splits["val"][0]["image"].shape == (3, 16, 16)
        assert task.interpolation == "bicubic"

    def test_without_a_model_it_has_to_be_given(self, class_folders):
        with pytest.raises(ConfigError, match="Set `image_size`"):
            loaded(ImageFolderDataModule(str(class_folders)))

    def test_a_policy_for_images_alone_is_refused_for_masks(self):
        with pytest.raises(ConfigError, match="cannot move masks"):
            MaskFolderDataModule("data", classes=["a"], augmentation="trivial")
