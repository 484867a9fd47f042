"""Images in folders by class."""

import os

import pytest

from lora_plugins.tasks import (
    DataError,
    ImageFolderDataModule,
)
from lora_plugins.tasks.data import Batch

from ..conftest import loaded, noise, write_image


class TestImageFolders:
    def test_samples(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), image_size=(8, 16), batch_size=3))
        assert data.class_names == ["cat", "dog"]
        batch = Batch.read(next(iter(data.val_dataloader())))
        assert batch.images.shape == (3, 3, 8, 16)
        assert batch.targets.tolist() == [0, 0, 1]
        assert batch.names[2] == str(class_folders / "val" / "dog" / "0.jpg")

    def test_train_is_shuffled_and_prediction_reads_val(self, class_folders):
        data = loaded(ImageFolderDataModule(str(class_folders), image_size=(8, 8)))
        assert len(data.train_dataloader().dataset) == 8
        assert len(data.predict_dataloader().dataset) == 4
        with pytest.raises(DataError, match="has no test split, only train, val"):
            data.test_dataloader()

    def test_a_missing_root_names_its_neighbors(self, class_folders):
        with pytest.raises(DataError, match="Did you mean 'data'"):
            loaded(ImageFolderDataModule(str(class_folders.parent / "dato")))

    def test_a_missing_split(self, class_folders):
        (class_folders / "val").rename(class_folders / "valid")
        with pytest.raises(DataError, match=r"no folder .*val: .*Did you mean 'valid'"):
            loaded(ImageFolderDataModule(str(class_folders)))

    def test_all_wrong_folders_are_listed(self, class_folders):
        (class_folders / "val" / "horse").mkdir()
        with pytest.raises(DataError) as error:
            loaded(ImageFolderDataModule(str(class_folders)))
        assert "val/horse holds no image" in str(error.value)
        assert "val/horse is no class of" in str(error.value)

    def test_a_broken_picture_is_named(self, class_folders):
        path = class_folders / "train" / "cat" / "0.jpg"
        path.write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"cat.0\.jpg cannot be read"):
            loaded(ImageFolderDataModule(str(class_folders))).splits["train"][0]

    @pytest.mark.parametrize("inside", [b"caf\xe9/0.jpg", b"cat/caf\xe9.jpg"], ids=["a class", "a picture"])
    def test_a_name_that_is_no_text_is_told(self, class_folders, inside):
        """As of an archive that was packed with another encoding."""
        write_image(class_folders / "train" / os.fsdecode(inside), noise())
        with pytest.raises(DataError, match=r"UTF-8\. Rename \(1\):\n.*caf.udce9"):
            loaded(ImageFolderDataModule(str(class_folders), image_size=(8, 8)))


def test_folders_of_classes_without_a_share_to_hold_out_say_so(flat_folders):
    with pytest.raises(DataError, match=r"has no 'train'.* set `val_share`, such as 0\.2"):
        loaded(ImageFolderDataModule(str(flat_folders), image_size=(8, 8)))
