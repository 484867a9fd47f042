"""Files that cannot be used, and sampling."""

import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
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
    SemanticSegmentationTask,
)
from lora_plugins.tasks.data import Batch
from lora_plugins.tasks.data.samples import LazySamples

from ..conftest import SIZE, loaded, noise, tiny_segformer, tiny_vit, write_image, written


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

    def test_a_split_that_the_data_does_not_have(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), **SIZE))
        with pytest.raises(DataError, match="ImageFolderDataModule has no test split, only train, val"):
            data.test_dataloader()

    def test_a_share_of_which_nothing_is_left_says_so(self, flat_folders):
        with pytest.raises(DataError, match=r"nothing in the val split\. A share of 0\.01 .* or raise `val_share`"):
            loaded(ImageFolderDataModule(str(flat_folders), val_share=0.01, **SIZE))

    def test_an_unknown_word(self):
        with pytest.raises(ConfigError, match="Did you mean 'skip'"):
            ImageFolderDataModule("data", on_problem="skipp")


class TestImagesInTwoSplits:
    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_are_told(self, class_folders, mask_folders, tmp_path, kind):
        labels = [("train/cat/0.jpg", "cat"), ("train/dog/0.jpg", "dog")]
        masks = [(f"images/train/{at}.jpg", f"masks/train/{at}.png") for at in range(2)]
        column, module, samples, options = {
            "labels": ("label", ImageListDataModule, labels, {}),
            "masks": ("mask", MaskListDataModule, masks, {"classes": ["a", "b", "c"]}),
        }[kind]
        rows = [{"image": image, column: target, "split": "train"} for image, target in samples]
        rows.append({**rows[0], "split": "val"})
        path = written(tmp_path / "data" / "list.csv", rows)
        with pytest.warns(UserWarning, match=f"1 image is in train and in another split.*{samples[0][0]}"):
            loaded(module(path, **options, **SIZE))

    def test_copies_of_other_names_and_encodings_are_told(self, class_folders):
        shutil.copy(class_folders / "train" / "cat" / "0.jpg", class_folders / "val" / "cat" / "same.jpg")
        Image.open(class_folders / "train" / "dog" / "1.jpg").save(class_folders / "val" / "dog" / "other.bmp")
        with pytest.warns(
            UserWarning, match=r"2 images are in.*train/cat/0.jpg = .*val/cat/same.jpg', '.*/1.jpg = .*/other.bmp'\."
        ):
            loaded(ImageFolderDataModule(str(class_folders), **SIZE))

    def test_images_that_share_a_mask_are_no_copies(self, mask_folders):
        rows = [
            {"image": f"images/{split}/{at}.jpg", "mask": "masks/train/0.png", "split": split}
            for split in ("train", "val")
            for at in range(2)
        ]
        loaded(MaskListDataModule(written(mask_folders / "list.csv", rows), classes=["a", "b", "c"], **SIZE))

    def test_images_that_differ_at_the_end_are_no_copies(self, class_folders):
        for split, last in (("train", 0), ("val", 255)):
            pixels = noise(150, 8)
            pixels[-1] = last
            write_image(class_folders / split / "cat" / "tall.png", pixels)
        loaded(ImageFolderDataModule(str(class_folders), **SIZE))

    def test_what_is_in_val_and_test_was_not_trained_on(self, class_folders):
        shutil.copytree(class_folders / "val", class_folders / "test")
        loaded(ImageFolderDataModule(str(class_folders), **SIZE))

    def test_copies_of_which_some_are_held_out_are_told(self, flat_folders):
        for path in flat_folders.rglob("*.jpg"):
            shutil.copy(path, path.with_name(f"copy of {path.name}"))
        with pytest.warns(UserWarning, match=r"in train and in another split.*= "):
            loaded(ImageFolderDataModule(str(flat_folders), val_share=0.2, **SIZE))


class TestImagesOfSeveralLabels:
    def test_are_told(self, class_folders):
        shutil.copy(class_folders / "train" / "cat" / "0.jpg", class_folders / "train" / "dog" / "same.jpg")
        with pytest.warns(UserWarning, match=r"1 image has several labels.*cat/0.jpg \(cat\) = .*/same.jpg \(dog\)'"):
            loaded(ImageFolderDataModule(str(class_folders), **SIZE))

    def test_copies_under_one_label_have_no_other(self, class_folders):
        shutil.copy(class_folders / "train" / "cat" / "0.jpg", class_folders / "train" / "cat" / "same.jpg")
        loaded(ImageFolderDataModule(str(class_folders), **SIZE))


class TestImagesThatAreAllNearlyBlack:
    """Of 16 bits the upper 8 are taken."""

    @staticmethod
    def loaded(folder, bits):
        for number in range(8):
            values = np.full((8, 8 + number), 2**bits - 1, np.uint16)
            write_image(folder / ("cat", "dog")[number % 2] / f"{number}.png", values)
        return loaded(ImageFolderDataModule(str(folder), val_share=0.5, **SIZE))

    @pytest.mark.parametrize(("bits", "brightest"), [(8, 0), (12, 15), (14, 63)])
    def test_are_told(self, tmp_path, bits, brightest):
        with pytest.warns(UserWarning, match=f"The brightest pixel of all images is {brightest} of 255"):
            self.loaded(tmp_path, bits)

    def test_no_word_of_those_that_fill_their_bits(self, tmp_path):
        assert len(self.loaded(tmp_path, 16).splits["train"]) == 4


class TestClassesThatDoNotOccur:
    def test_one_class_only(self, class_folders):
        for split in ("train", "val"):
            shutil.rmtree(class_folders / split / "dog")
        with pytest.raises(DataError, match=r"Of the classes cat, 1 occurs in the train split.*other classes"):
            loaded(ImageFolderDataModule(str(class_folders), **SIZE))

    def test_masks_of_black_and_white(self, tmp_path):
        for turn, split in enumerate(("train", "val")):
            for i in range(3):
                write_image(tmp_path / "images" / split / f"{i}.jpg", noise(8, 8, seed=(i, turn)))
                mask = Image.fromarray((noise(8, 8, seed=i) > 128).astype("uint8")[..., 0] * 255)
                (tmp_path / "masks" / split).mkdir(parents=True, exist_ok=True)
                mask.save(tmp_path / "masks" / split / f"{i}.png")
        classes = ["background", "object"]
        with pytest.raises(DataError, match=r"1 occurs in the train split.*\n?.*colors: \{background"):
            loaded(MaskFolderDataModule(str(tmp_path), classes=classes, **SIZE))
        colors = {"background": [0, 0, 0], "object": [255, 255, 255]}  # as the message says
        data = loaded(MaskFolderDataModule(str(tmp_path), classes=classes, colors=colors, **SIZE))
        assert data.class_counts().min() > 0

    def test_one_of_several(self, mask_folders):
        with pytest.warns(UserWarning, match="The train split holds nothing of 'd'"):
            loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c", "d"], **SIZE))


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_one_model_after_another_has_images_of_its_own_size(kind, class_folders, mask_folders, trainer):
    data, tasks = {
        "labels": (
            ImageFolderDataModule(str(class_folders), batch_size=4),
            [ImageClassificationTask(tiny_vit(2, img_size=side)) for side in (32, 64)],
        ),
        "masks": (
            MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"]),
            [SemanticSegmentationTask(tiny_segformer(3), ignore_index=255) for _ in range(2)],
        ),
    }[kind]
    for task, size in zip(tasks, ((32, 32), (64, 64)), strict=True):
        task.image_size = size
        trainer().fit(task, datamodule=data)
        assert [data.splits[split][0]["image"].shape[1:] for split in ("train", "val")] == [size, size]


class SoftMasks(MaskFolderDataModule):
    """Its masks are fractions, not classes."""

    def read(self, item):
        image, mask = super().read(item)
        return image, mask.astype(np.float32) / 2


def test_masks_of_fractions_stay_fractions(mask_folders):
    data = loaded(SoftMasks(str(mask_folders), classes=["a", "b", "c"], augmentation="none", **SIZE, check_files=False))
    assert data.splits["train"][0]["target"].unique().tolist() == [0.0, 0.5, 1.0, 127.5]


class TestSampling:
    def test_balanced_draws_each_class_equally_often(self, tmp_path):
        for name, count in (("many", 45), ("few", 5)):
            for i in range(count):
                write_image(tmp_path / "data" / "train" / name / f"{i}.png", noise(8, 8, seed=i + 50 * (name == "few")))
            write_image(tmp_path / "data" / "val" / name / "0.png", noise(8, 8, seed=100 + count))
        torch.manual_seed(0)
        data = loaded(ImageFolderDataModule(str(tmp_path / "data"), sampler="balanced", batch_size=10, **SIZE))
        drawn = torch.cat([Batch.read(batch).targets for _ in range(8) for batch in data.train_dataloader()])
        assert 0.4 < float((drawn == 0).float().mean()) < 0.6
        assert data.class_counts().tolist() == [5, 45]

    def test_masks_are_counted_once(self, mask_folders, trainer):
        """Not by each run of a task with balanced weights."""
        data, read = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32)), []
        task = SemanticSegmentationTask(tiny_segformer(3), ignore_index=255, class_weights="balanced")
        trainer(max_steps=1).fit(task, data)
        weights, own = task.weights, data.targets
        data.targets = lambda split: read.append(split) or own(split)
        trainer().validate(task, data)
        assert not read
        assert torch.equal(task.weights, weights)

    def test_a_train_split_that_was_replaced_is_counted_anew(self, class_folders):
        """As the folds of a cross-validation are; and what was counted is nobody else's to change."""
        data = loaded(ImageFolderDataModule(str(class_folders), **SIZE))
        samples, counts = data.splits["train"], data.class_counts().tolist()
        data.class_counts().zero_()
        assert data.class_counts().tolist() == counts
        data.splits["train"] = LazySamples([item for item in samples.items if item.target], data.read, None)
        assert data.class_counts().tolist() == [0, *counts[1:]]

    def test_masks_have_many_classes(self, mask_folders):
        data = loaded(MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], sampler="balanced", **SIZE))
        with pytest.raises(ConfigError, match="one class a sample"):
            data.train_dataloader()

    def test_a_last_batch_of_one_is_left_out(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), batch_size=7, **SIZE))
        assert [len(Batch.read(batch).images) for batch in data.train_dataloader()] == [7]

    @pytest.mark.parametrize(("batch_size", "dropped"), [(3, True), (7, False)])
    def test_it_is_told_by_the_samples_of_one_process(self, class_folders, batch_size, dropped):
        data = ImageFolderDataModule(str(class_folders), batch_size=batch_size, **SIZE)
        data.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)  # each has 4 of 8
        assert loaded(data).train_dataloader().drop_last is dropped


class Sent(Callback):
    """Sends the samples of a fit to another process, as to workers that are not forked; it cannot go along itself."""

    def __init__(self):
        self.lock = threading.Lock()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.received = pickle.loads(pickle.dumps(trainer.datamodule.splits["train"]))


class Spawning(ImageFolderDataModule):
    def _loader(self, split):
        loader = super()._loader(split)
        loader.multiprocessing_context = "spawn"
        return loader


class TestWorkers:
    @pytest.mark.parametrize("kind", ["folders", "list", "rows"])
    def test_that_are_not_forked_read_labels(self, request, tmp_path, trainer, kind):
        source = request.getfixturevalue("labeled_rows" if kind == "rows" else "class_folders")
        rows = [{"image": f"{s}/{n}/0.jpg", "label": n, "split": s} for s in ("train", "val") for n in ("cat", "dog")]
        data = {
            "folders": lambda: ImageFolderDataModule(str(source), augmentation="none"),
            "list": lambda: ImageListDataModule(written(source / "list.csv", rows), augmentation="none"),
            "rows": lambda: HubImageDataModule(str(source), augmentation="none"),
        }[kind]()
        self.check(trainer, ImageClassificationTask(tiny_vit(2)), data)

    @pytest.mark.parametrize("kind", ["folders", "rows"])
    def test_that_are_not_forked_read_masks(self, request, trainer, kind):
        source = str(request.getfixturevalue("masked_rows" if kind == "rows" else "mask_folders"))
        options = {"classes": ["a", "b", "c"], "augmentation": "none", "image_size": (32, 32)}
        data = (
            HubMaskDataModule(source, mask_column="annotation", reduce_labels=True, **options)
            if kind == "rows"
            else MaskFolderDataModule(source, **options)
        )
        self.check(trainer, SemanticSegmentationTask(tiny_segformer(3), ignore_index=255), data)

    @pytest.mark.slow
    def test_that_are_spawned_train(self, class_folders, trainer):
        data = Spawning(str(class_folders), num_workers=1, batch_size=4)
        trainer(num_sanity_val_steps=1).fit(ImageClassificationTask(tiny_vit(2)), data)

    def check(self, trainer, task, data):
        sent = Sent()
        trainer(callbacks=[sent]).fit(task, data)
        ours, theirs = data.splits["train"][1], sent.received[1]
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(torch.as_tensor(ours["target"]), torch.as_tensor(theirs["target"]))
