"""Splits that are the same on every machine."""

from collections import Counter
from functools import partial

import pytest

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    ImageFolderDataModule,
    MaskFolderDataModule,
)

from ..conftest import SIZE, loaded


class TestSplits:
    def names(self, data, split):
        return {item.name for item in data.splits[split].items}

    def test_they_are_made_again(self, flat_folders):
        one, two = (loaded(ImageFolderDataModule(str(flat_folders), val_share=0.2, **SIZE)) for _ in range(2))
        assert self.names(one, "val") == self.names(two, "val")
        assert not self.names(one, "val") & self.names(one, "train")
        assert Counter(item.target for item in one.splits["val"].items) == {0: 1, 1: 1}

    def test_another_seed_gives_another_split(self, flat_folders):
        make = partial(ImageFolderDataModule, str(flat_folders), val_share=0.4, **SIZE)
        found = {frozenset(self.names(loaded(make(split_seed=seed)), "val")) for seed in range(5)}
        assert len(found) > 1

    def test_what_is_given_stays(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), val_share=0.5, test_share=0.25, **SIZE))
        assert [len(data.splits[s]) for s in ("train", "val", "test")] == [6, 4, 2]

    def test_masks_are_split_too(self, mask_folders):
        for kind in ("images", "masks"):
            for path in (mask_folders / kind / "train").iterdir():
                path.rename(mask_folders / kind / path.name)
            (mask_folders / kind / "train").rmdir()
        data = loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], val_share=0.25, **SIZE))
        assert [len(data.splits[s]) for s in ("train", "val")] == [3, 1]

    def test_shares_that_leave_nothing(self):
        with pytest.raises(ConfigError, match="below 1"):
            ImageFolderDataModule("data", val_share=0.6, test_share=0.4)
