"""A task, its data and its checkpoints mean the same classes by the same labels."""

import pytest

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    ImageClassificationTask,
    MaskFolderDataModule,
    SemanticSegmentationTask,
)

from ..conftest import digits, tiny_segformer, tiny_vit


def test_another_ignore_index_than_the_data_is_refused_before_training(trainer, mask_folders):
    data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32))
    with pytest.raises(ConfigError, match="Set `ignore_index` of the task to 255"):
        trainer().fit(SemanticSegmentationTask(tiny_segformer(3)), datamodule=data)


def test_data_of_other_classes_are_refused_before_training(trainer):
    with pytest.raises(ConfigError, match=r"4 classes \(6, 7, 8, 9\).*num_classes=3"):
        trainer().fit(ImageClassificationTask(tiny_vit()), datamodule=digits(digits=[6, 7, 8, 9]))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_checkpoint_of_other_classes_is_refused(trainer, tmp_path, stage):
    file = str(tmp_path / "task.ckpt")
    run = trainer(max_steps=1)
    run.fit(ImageClassificationTask(tiny_vit()), datamodule=digits(digits=[4, 5, 6]))
    run.save_checkpoint(file)
    other = digits(digits=[7, 8, 9])
    with pytest.raises(ConfigError, match="is of the classes 4, 5, 6, and here they are 7, 8, 9"):
        getattr(trainer(), stage)(ImageClassificationTask(tiny_vit()), datamodule=other, ckpt_path=file)
    renamed = ImageClassificationTask(tiny_vit(), class_names=["4", "5", "6"])
    getattr(trainer(), stage)(renamed, datamodule=other, ckpt_path=file)


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "of an earlier fit"])
def test_classes_in_another_order_are_refused(trainer, given, stage):
    """The names would be those of other labels, in all files and reports, and metrics those of other classes."""
    task = ImageClassificationTask(tiny_vit(), class_names=["1", "0", "2"] if given else None)
    if not given:
        trainer(max_steps=1).fit(task, datamodule=digits(digits=[1, 0, 2]))
    with pytest.raises(ConfigError, match=r"the classes 0, 1, 2, in this order, and the task 1, 0, 2: labels would"):
        getattr(trainer(), stage)(task, datamodule=digits(digits=[0, 1, 2]))
    assert task.class_names == ["1", "0", "2"]


def test_classes_with_names_of_their_own_are_told(trainer, caplog):
    task = ImageClassificationTask(tiny_vit(), class_names=["0", "one", "two"])
    trainer(max_steps=1).fit(task, datamodule=digits())
    assert "other names in the task (`class_names`): '1', '2' are 'one', 'two'." in caplog.text
    assert task.class_names == ["0", "one", "two"]
