"""Images and masks from a list."""

import pytest

from lora_plugins.tasks import (
    DataError,
    MaskListDataModule,
)

from ..conftest import SIZE, loaded, written


class TestLists:
    def test_masks(self, mask_folders):
        rows = [
            {"image": f"images/{s}/{i}.jpg", "mask": f"masks/{s}/{i}.png", "split": s}
            for s, count in (("train", 4), ("val", 2))
            for i in range(count)
        ]
        data = loaded(MaskListDataModule(written(mask_folders / "l.csv", rows), classes=["a", "b", "c"], **SIZE))
        assert data.splits["val"][0]["target"].shape == (8, 8)

    def test_the_column_of_splits_that_is_named_has_to_be_there(self, mask_folders):
        rows = [{"image": "images/train/0.jpg", "mask": "masks/train/0.png", "fold": "train"}]
        path = written(mask_folders / "l.csv", rows)
        with pytest.raises(DataError, match=r"l.csv has no column 'folds', which is .* split_column. Did .* 'fold'"):
            MaskListDataModule(path, classes=["a", "b"], split_column="folds").find()
