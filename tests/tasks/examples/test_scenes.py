"""The embedded scenes."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DigitScenesDataModule,
)

from ..conftest import loaded


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
