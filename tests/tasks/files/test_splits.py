"""Splits that are the same on every machine."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    HubImageDataModule,
    ImageFolderDataModule,
    ImageListDataModule,
    MaskFolderDataModule,
    MaskListDataModule,
)

from ..conftest import SIZE, loaded, noise, write_image, written


def with_absolute_paths(root, name):
    """Writes a list again with the absolute paths of its files, as scripts make it."""
    rows = [
        {"image": f"sorted/{'ab'[i % 2]}/{i}.png", "label": "ab"[i % 2], "mask": f"masks/{i}.png"} for i in range(16)
    ]
    paths = [{key: str((root / row[key]).absolute()) for key in ("image", "mask")} for row in rows]
    return written(root / name, [row | path for row, path in zip(rows, paths, strict=True)])


FOUND = {
    "class folders": lambda root, **options: ImageFolderDataModule(str(root / "sorted"), **options),
    "class list": lambda root, **options: ImageListDataModule(str(root / "labels.csv"), **options),
    "mask folders": lambda root, **options: MaskFolderDataModule(str(root), classes=["a", "b"], **options),
    "mask list": lambda root, **options: MaskListDataModule(str(root / "masks.jsonl"), classes=["a", "b"], **options),
    "class list, absolute": lambda root, **options: ImageListDataModule(
        with_absolute_paths(root, "absolute.csv"), **options
    ),
    "mask list, absolute": lambda root, **options: MaskListDataModule(
        with_absolute_paths(root, "absolute.csv"), classes=["a", "b"], **options
    ),
    "rows": lambda root, **options: HubImageDataModule(str(root / "rows"), **options),
}


def write_samples(root):
    """Sixteen images in each of the ways that data can be given, not split yet."""
    labels, masks = [], []
    for i in range(16):
        image = write_image(root / "sorted" / "ab"[i % 2] / f"{i}.png", noise(8, 8, seed=i))
        write_image(root / "images" / f"{i}.png", noise(8, 8, seed=i))
        write_image(root / "masks" / f"{i}.png", noise(8, 8, seed=i)[..., 0] % 2)
        labels.append({"image": image.relative_to(root).as_posix(), "label": "ab"[i % 2]})
        masks.append({"image": f"images/{i}.png", "mask": f"masks/{i}.png"})
    written(root / "labels.csv", labels)
    written(root / "masks.jsonl", masks)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    pictures = [str(root / row["image"]) for row in labels]
    rows = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(16)]}, features=features)
    DatasetDict({"train": rows}).save_to_disk(root / "rows")


def place(item):
    """The file name of an image, or its row."""
    return item.image.name if isinstance(item.image, Path) else item.image


class TestSplits:
    def names(self, data, split):
        return {item.name for item in data.splits[split].items}

    def test_they_are_made_again(self, flat_folders):
        one, two = (loaded(ImageFolderDataModule(str(flat_folders), val_share=0.2, **SIZE)) for _ in range(2))
        assert self.names(one, "val") == self.names(two, "val")
        assert not self.names(one, "val") & self.names(one, "train")
        assert Counter(item.target for item in one.splits["val"].items) == {0: 1, 1: 1}

    @pytest.mark.parametrize("kind", FOUND)
    def test_they_are_the_same_wherever_the_data_are(self, kind, tmp_path, monkeypatch):
        """In another folder, on another machine, by a path from elsewhere: or a run would be judged on its own data."""
        write_samples(tmp_path / "here")
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        monkeypatch.chdir(tmp_path)
        roots = [tmp_path / "here", tmp_path / "there", Path("here"), Path("there/../here")]
        splits = [loaded(FOUND[kind](root, val_share=0.25, check_files=False, **SIZE)).splits for root in roots]
        held = [[place(item) for item in split["val"].items] for split in splits]
        assert len(held[0]) == 4
        assert held[1:] == held[:-1]

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
