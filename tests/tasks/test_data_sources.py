"""Lists, Hugging Face data sets, masks in color, splits, sampling, and files that cannot be used."""

import csv
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    HubImageDataModule,
    HubMaskDataModule,
    ImageClassificationTask,
    ImageFolderDataModule,
    ImageListDataModule,
    MaskFolderDataModule,
    MaskListDataModule,
)
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.segmentation import MaskDecoder

from .conftest import noise, tiny_vit, write_image

SIZE = {"image_size": (8, 8)}
COLORS = {"sky": [0, 0, 255], "road": [128, 64, 128], "void": [0, 0, 0]}


def loaded(data):
    data.setup("fit")
    return data


def written(path, rows):
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


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

    def test_masks(self, mask_folders):
        rows = [
            {"image": f"images/{s}/{i}.jpg", "mask": f"masks/{s}/{i}.png", "split": s}
            for s, count in (("train", 4), ("val", 2))
            for i in range(count)
        ]
        data = loaded(MaskListDataModule(written(mask_folders / "l.csv", rows), classes=["a", "b", "c"], **SIZE))
        assert data.splits["val"][0]["target"].shape == (8, 8)

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


class TestMaskDecoder:
    def picture(self, *colors):
        return Image.fromarray(np.array([colors], dtype=np.uint8))

    def test_colors_by_a_table(self):
        code = MaskDecoder(["sky", "road"], 255, COLORS)
        found = code.decode(self.picture([128, 64, 128], [0, 0, 255], [0, 0, 0]), "m")
        assert found.tolist() == [[1, 0, 255]]

    def test_the_table_names_the_classes(self):
        assert MaskDecoder(None, 255, COLORS).classes == ["sky", "road", "void"]

    def test_an_unknown_color(self):
        with pytest.raises(DataError, match="m holds the colors #010203"):
            MaskDecoder(None, 255, COLORS).decode(self.picture([1, 2, 3]), "m")

    def test_a_palette_counts_by_its_indices(self):
        picture = Image.fromarray(np.array([[1, 0]], dtype=np.uint8)).convert("P")
        picture.putdata([1, 0])
        picture.putpalette([9, 9, 9, 7, 7, 7])
        assert MaskDecoder(["a", "b"], 255).decode(picture, "m").tolist() == [[1, 0]]

    def test_reduced_labels(self):
        picture = Image.fromarray(np.array([[0, 1, 2, 255]], dtype=np.uint8))
        assert MaskDecoder(["a", "b"], 255, reduce_labels=True).decode(picture, "m").tolist() == [[255, 0, 1, 255]]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((None, 255), "Name the `classes`"),
            ((["a"], 255, COLORS), "no color for the classes a"),
            ((["a", "b"], 1), "is the class 'b'"),
            ((None, 255, {"a": [1, 2]}), "three numbers"),
            ((None, 255, {"a": [1, 2, 3], "b": [1, 2, 3]}), "another name"),
        ],
        ids=["nothing", "no color", "ignored class", "short", "twice"],
    )
    def test_wrong_tables(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            MaskDecoder(*arguments)


class TestProblems:
    def damage(self, class_folders):
        for name in ("cat", "dog"):
            (class_folders / "train" / name / "0.jpg").write_bytes(b"no picture")

    def test_all_are_listed_in_one_pass(self, class_folders):
        self.damage(class_folders)
        with pytest.raises(DataError, match="2 problems") as error:
            loaded(ImageFolderDataModule(str(class_folders), **SIZE))
        assert all(f"{name}/0.jpg cannot be read" in str(error.value) for name in ("cat", "dog"))

    def test_they_are_left_out_when_asked(self, class_folders):
        self.damage(class_folders)
        with pytest.warns(UserWarning, match="2 problems"):
            data = loaded(ImageFolderDataModule(str(class_folders), on_problem="skip", **SIZE))
        assert len(data.splits["train"]) == 6

    def test_unpaired_masks_are_left_out_when_asked(self, mask_folders):
        (mask_folders / "masks" / "train" / "0.png").unlink()
        with pytest.warns(UserWarning, match="has no mask"):
            data = loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], on_problem="skip", **SIZE))
        assert len(data.splits["train"]) == 3

    def test_an_unknown_word(self):
        with pytest.raises(ConfigError, match="Did you mean 'skip'"):
            ImageFolderDataModule("data", on_problem="skipp")


class TestSampling:
    def test_balanced_draws_each_class_equally_often(self, tmp_path):
        for name, count in (("many", 45), ("few", 5)):
            for i in range(count):
                write_image(tmp_path / "data" / "train" / name / f"{i}.png", noise(8, 8, seed=i))
            write_image(tmp_path / "data" / "val" / name / "0.png", noise(8, 8))
        torch.manual_seed(0)
        data = loaded(ImageFolderDataModule(str(tmp_path / "data"), sampler="balanced", batch_size=10, **SIZE))
        drawn = torch.cat([Batch.read(batch).targets for _ in range(8) for batch in data.train_dataloader()])
        assert 0.4 < float((drawn == 0).float().mean()) < 0.6
        assert data.class_counts().tolist() == [5, 45]

    def test_masks_have_many_classes(self, mask_folders):
        data = loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], sampler="balanced", **SIZE))
        with pytest.raises(ConfigError, match="one class a sample"):
            data.train_dataloader()

    def test_a_last_batch_of_one_is_left_out(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), batch_size=7, **SIZE))
        assert [len(Batch.read(batch).images) for batch in data.train_dataloader()] == [7]


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


class TestHub:
    @pytest.fixture(autouse=True)
    def needs_datasets(self):
        pytest.importorskip("datasets")

    def test_labels(self, labeled_rows):
        data = loaded(HubImageDataModule(str(labeled_rows), check_files=True, **SIZE))
        assert data.class_names == ["cat", "dog"]
        assert [len(data.splits[split]) for split in ("train", "val")] == [6, 2]
        assert data.splits["val"][1]["target"] == 1

    def test_masks(self, masked_rows):
        data = loaded(
            HubMaskDataModule(
                str(masked_rows), classes=["a", "b", "c"], reduce_labels=True, check_files=True, image_size=(20, 24)
            )
        )
        raw = np.random.default_rng(0).integers(0, 4, (20, 24), dtype=np.uint8)
        expected = np.where(raw == 0, 255, raw.astype(int) - 1)
        assert np.array_equal(data.splits["val"][0]["target"].numpy(), expected)

    def test_an_unknown_column(self, labeled_rows):
        with pytest.raises(ConfigError, match="Did you mean 'image'"):
            loaded(HubImageDataModule(str(labeled_rows), image_column="imag", **SIZE))

    def test_an_unknown_split(self, labeled_rows):
        with pytest.raises(ConfigError, match="Did you mean 'validation'"):
            loaded(HubImageDataModule(str(labeled_rows), splits={"train": "train", "val": "validatio"}, **SIZE))

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
