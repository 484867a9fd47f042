"""Images and labels from a list."""

import json
from pathlib import Path

import pytest

from lora_plugins.tasks import (
    DataError,
    ImageListDataModule,
)
from lora_plugins.tasks.data import Batch
from tests.growth import calls

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

    def test_labels_are_looked_up_among_many_classes(self, class_folders):
        compared: list[object] = []

        class Name(str):
            __slots__ = ()
            __hash__ = str.__hash__

            def __eq__(self, other):
                compared.append(other)
                return str.__eq__(self, other)

        rows = self.rows(class_folders)
        names = [*(f"class {at}" for at in range(500)), "cat", "dog"]
        data = ImageListDataModule(written(class_folders / "list.csv", rows), classes=[*map(Name, names)], **SIZE)
        compared.clear()
        items, _ = data.find()
        assert {item.target for item in items["train"]} == {500, 501}
        assert len(compared) < 10 * len(rows)

    def test_the_column_of_splits_that_is_named_has_to_be_there(self, class_folders):
        path = written(class_folders / "list.csv", [{**row, "fold": row["split"]} for row in self.rows(class_folders)])
        assert {*ImageListDataModule(path, split_column="fold").find()[0]} == {"train", "val"}
        with pytest.raises(DataError, match=r"list.csv has no column 'folds', which is .* split_column. Did .* 'fold'"):
            ImageListDataModule(path, split_column="folds", val_share=0.5).find()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": ""}, "Row 1 of .* has no value in the column 'label'"),
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

    @pytest.mark.parametrize("ending", [".csv", ".jsonl"])
    @pytest.mark.parametrize("end", ["\n", "\x0b", "\x85", "\u2028"], ids=["line", "tab", "next", "separator"])
    def test_a_label_with_an_end_of_a_line_in_it(self, class_folders, ending, end):
        """Of JSON, a line break is escaped; the others are not where `ensure_ascii` is off."""
        rows = [row | {"label": row["label"] + f"{end}s"} for row in self.rows(class_folders)]
        path = Path(written(class_folders / f"list{ending}", rows))
        if ending == ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        data = loaded(ImageListDataModule(str(path), **SIZE))
        assert data.class_names == [f"cat{end}s", f"dog{end}s"]

    @pytest.mark.parametrize(
        ("row", "message"),
        [("a.jpg,cat, tabby", "Row 2 of .* more values than columns"), ("a.jpg," + "x" * 200_000, "is no CSV: field")],
        ids=["a comma without quotes", "a field without an end"],
    )
    def test_a_csv_that_is_not_well_formed(self, class_folders, row, message):
        (class_folders / "l.csv").write_text(f"image,label\na.jpg,dog\n{row}\n")
        with pytest.raises(DataError, match=message):
            loaded(ImageListDataModule(str(class_folders / "l.csv"), **SIZE))

    def test_spaces_around_the_values_of_a_csv_are_not_theirs(self, class_folders):
        rows = [f"{row['image']} , {row['label']}, {row['split']} " for row in self.rows(class_folders)]
        rows[0] = rows[0].replace(" cat", ' "cat"')
        (class_folders / "l.csv").write_text("\n".join(["image, label, split", *rows]))
        data = loaded(ImageListDataModule(str(class_folders / "l.csv"), **SIZE))
        assert data.class_names == ["cat", "dog"]
        assert [len(data.splits[split]) for split in ("train", "val")] == [8, 4]

    @pytest.mark.parametrize("on_problem", ["error", "skip"])
    def test_an_image_with_two_labels(self, class_folders, on_problem):
        rows = self.rows(class_folders)
        rows.append(rows[0] | {"label": "cat" if rows[0]["label"] == "dog" else "dog"})
        data = ImageListDataModule(written(class_folders / "l.csv", rows), **SIZE, on_problem=on_problem)
        told = r"Row 13 of .* has the label '(cat|dog)', and in row 1 '(cat|dog)'"
        with pytest.raises(DataError, match=told) if on_problem == "error" else pytest.warns(UserWarning, match=told):
            loaded(data)

    def test_an_image_that_is_listed_twice_is_in_one_split(self, class_folders):
        rows = [{"image": row["image"], "label": row["label"]} for row in self.rows(class_folders)]
        path = written(class_folders / "l.csv", [*rows, *rows])
        for seed in range(8):
            data = loaded(ImageListDataModule(path, val_share=0.4, split_seed=seed, **SIZE))
            train, val = ({item.image for item in data.splits[split].items} for split in ("train", "val"))
            assert not train & val

    def test_near_names_are_looked_for_only_where_they_are_told(self, tmp_path):
        """Of many classes, it takes long; a list of labels that are all written otherwise would have no end."""
        steps = []
        for rows in (50, 100):
            path = written(
                tmp_path / f"{rows}.csv", [{"image": f"{at}.jpg", "label": f"Cat{at}"} for at in range(rows)]
            )
            data = ImageListDataModule(path, classes=[f"cat{at}" for at in range(100)])
            steps.append(calls(data.find))
        assert steps[1] - steps[0] < 50 * 100
