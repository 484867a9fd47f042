"""Images and labels from a list."""

import pytest

from lora_plugins.tasks import (
    DataError,
    ImageListDataModule,
)
from lora_plugins.tasks.data import Batch

from ..conftest import SIZE, loaded, written


class TestLists:
    def rows(self, class_folders):
        paths = sorted(class_folders.rglob("*.jpg"))
        return [
            {"image": str(p.relative_to(class_folders)), "label": p.parent.name, "split": p.parent.parent.name}
            for p in paths
        ]

    @pytest.mark.parametrize("ending", [".csv", ".jsonl"])
    def test_labels(self, class_folders, ending):
        data = loaded(ImageListDataModule(written(class_folders / f"list{ending}", self.rows(class_folders)), **SIZE))
        assert data.class_names == ["cat", "dog"]
        assert [len(data.splits[split]) for split in ("train", "val")] == [8, 4]
        batch = Batch.read(next(iter(data.val_dataloader())))
        assert batch.targets.tolist() == [0, 0, 1, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": ""}, "Row 1 of .*column 'label'"),
            ({"split": "trian"}, "Did you mean 'train'"),
        ],
        ids=["no label", "split"],
    )
    def test_rows_that_cannot_be_read(self, class_folders, change, message):
        rows = self.rows(class_folders)
        rows[0] |= change
        with pytest.raises(DataError, match=message):
            loaded(ImageListDataModule(written(class_folders / "l.csv", rows), **SIZE))

    def test_a_line_that_is_no_json(self, class_folders):
        (class_folders / "l.jsonl").write_text('{"image": "a.jpg", "label": "cat"}\n{"image": \n')
        with pytest.raises(DataError, match="Line 2 of"):
            loaded(ImageListDataModule(str(class_folders / "l.jsonl"), **SIZE))
