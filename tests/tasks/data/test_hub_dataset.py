"""Data sets of Hugging Face."""

import numpy as np
import pytest
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    HubImageDataModule,
    HubMaskDataModule,
)
from lora_plugins.tasks.autoconfig.found import Flags
from lora_plugins.tasks.autoconfig.survey import survey

from ..conftest import SIZE, loaded, noise

UNLABELED = {
    "of named classes": ([0, 1, None, 0, 1, 1], None),
    "-1 for none": ([0, 1, -1, 0, 1, 1], None),
    "texts": (["a", "b", None, "a", "b", "b"], "string"),
    "numbers": ([0.0, 1.0, float("nan"), 0.0, 1.0, 1.0], "float32"),
}


class TestHub:
    @pytest.fixture(autouse=True)
    def needs_datasets(self):
        pytest.importorskip("datasets")

    def test_labels(self, labeled_rows):
        data = loaded(HubImageDataModule(str(labeled_rows), check_files=True, **SIZE))
        assert data.class_names == ["cat", "dog"]
        assert [len(data.splits[split]) for split in ("train", "val")] == [6, 2]
        assert data.splits["val"][1]["target"] == 1

    @pytest.mark.parametrize("part", ["", "train"], ids=["splits", "one split"])
    def test_what_was_saved_has_no_subsets(self, labeled_rows, part):
        folder = str(labeled_rows / part)
        with pytest.raises(ConfigError, match=f"subset is 'plain_text', and {folder} was saved by save_to_disk"):
            loaded(HubImageDataModule(folder, subset="plain_text", **SIZE))

    @pytest.fixture(params=UNLABELED.values(), ids=UNLABELED)
    def unlabeled_rows(self, request, tmp_path, labeled_rows):
        """The labeled rows, of which row 2 of the train split has no label."""
        from datasets import Dataset, DatasetDict, Features, Value, load_from_disk

        labels, kind = request.param
        splits = load_from_disk(str(labeled_rows))
        feature = splits["train"].features["label"] if kind is None else Value(kind)
        features = Features({"image": splits["train"].features["image"], "label": feature})
        for name, of in (("train", labels), ("validation", labels[:2])):
            splits[name] = Dataset.from_dict({"image": splits[name]["image"][:], "label": of}, features=features)
        DatasetDict(splits).save_to_disk(tmp_path / "unlabeled")
        return str(tmp_path / "unlabeled")

    def test_rows_without_a_label_are_listed(self, unlabeled_rows):
        with pytest.raises(DataError, match=r"(?s)1 problem.*row 2 of .*, train has (None|nan|-1) as its label"):
            loaded(HubImageDataModule(unlabeled_rows, **SIZE))
        with pytest.raises(DataError, match=r"(?s)1 of 8 rows have no label.*row 2 of .*on_problem: skip"):
            survey(unlabeled_rows, Flags())

    def test_rows_without_a_label_are_left_out_when_asked(self, unlabeled_rows):
        with pytest.warns(UserWarning, match="1 problem"):
            data = loaded(HubImageDataModule(unlabeled_rows, on_problem="skip", **SIZE))
        assert [int(sample["target"]) for sample in data.splits["train"]] == [0, 1, 0, 1, 1]

    @pytest.mark.parametrize("check_files", [False, True])
    def test_a_test_split_without_labels_is_predicted(self, tmp_path, labeled_rows, check_files):
        """Its images are copies of labeled ones, which the check of files must not call a second label."""
        from datasets import DatasetDict, load_from_disk

        splits = load_from_disk(str(labeled_rows))
        splits["test"] = splits["validation"].map(lambda row: {"label": -1})
        DatasetDict(splits).save_to_disk(tmp_path / "unlabeled")
        data = loaded(HubImageDataModule(str(tmp_path / "unlabeled"), check_files=check_files, **SIZE))
        assert len(data.predict_dataloader().dataset) == len(splits["test"])

    def test_masks(self, masked_rows):
        data = loaded(
            HubMaskDataModule(
                str(masked_rows), classes=["a", "b", "c"], reduce_labels=True, check_files=True, image_size=(20, 24)
            )
        )
        raw = np.random.default_rng(0).integers(0, 4, (20, 24), dtype=np.uint8)
        expected = np.where(raw == 0, 255, raw.astype(int) - 1)
        assert np.array_equal(data.splits["val"][0]["target"].numpy(), expected)

    def test_images_of_other_columns_are_not_read(self, tmp_path, labeled_rows):
        from datasets import Features, load_from_disk
        from datasets import Image as Picture

        splits = load_from_disk(str(labeled_rows))
        features = Features({**splits["train"].features, "preview": Picture()})
        broken = splits.map(lambda row: {"preview": {"bytes": b"no picture", "path": None}}, features=features)
        broken.save_to_disk(tmp_path / "broken")
        data = loaded(HubImageDataModule(str(tmp_path / "broken"), **SIZE))
        assert data.splits["val"][1]["target"] == 1

    def test_an_unknown_column(self, labeled_rows):
        with pytest.raises(ConfigError, match="Did you mean 'image'"):
            loaded(HubImageDataModule(str(labeled_rows), image_column="imag", **SIZE))

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            ({"train": "train", "val": "validatio"}, "Did you mean 'validation'"),
            ({"train": "train", "vall": "validation"}, "Did you mean 'val'"),
            ({"val": "validation"}, "has no train split, only train, validation"),
        ],
        ids=["of the data", "of the module", "none to train on"],
    )
    def test_an_unknown_split(self, labeled_rows, splits, message):
        with pytest.raises(ConfigError, match=message):
            loaded(HubImageDataModule(str(labeled_rows), splits=splits, **SIZE))

    def test_a_split_without_masks(self, masked_rows):
        from datasets import Dataset, load_from_disk

        splits, folder = load_from_disk(str(masked_rows)), masked_rows.parent / "all"
        rows = {"image": [Image.fromarray(noise())], "annotation": [None]}
        splits["test"] = Dataset.from_dict(rows, features=splits["train"].features)
        splits.save_to_disk(folder)
        data = loaded(HubMaskDataModule(str(folder), classes=["a", "b", "c", "d"], **SIZE))
        with pytest.raises(DataError, match=r"row 0 of .*, test has no annotation"):
            data.splits["test"][0]

    def test_a_script(self, tmp_path):
        """As scene_parse_150 of PEFT's guide is one: `datasets` says so, and no release from 4 on runs it."""
        (tmp_path / "scenes").mkdir()
        (tmp_path / "scenes" / "scenes.py").write_text("raise AssertionError('nobody asked for this')")
        with pytest.raises(DataError, match=r"could not be loaded: .*script"):
            loaded(HubImageDataModule(str(tmp_path / "scenes"), **SIZE))
