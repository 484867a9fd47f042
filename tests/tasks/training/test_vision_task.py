"""What all tasks share: labels are checked, checkpoints are plain."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    DigitsDataModule,
    ImageClassificationTask,
    MaskFolderDataModule,
    ModelConfig,
    SemanticSegmentationTask,
)

from ..conftest import tiny_segformer, tiny_vit


def digits(**changes):
    return DigitsDataModule(**({"digits": [0, 1, 2]} | changes))


class TestLabels:
    def test_a_label_out_of_range_names_the_file(self, trainer, mask_folders):
        data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32), batch_size=4)
        data.setup("fit")
        task = SemanticSegmentationTask(tiny_segformer(3))  # whose ignore_index is not that of the data
        with pytest.raises(DataError, match=r"Label 255 in .*masks.train.\d\.png.*labels are 0 to 2, or -100"):
            trainer().fit(task, data.train_dataloader(), data.val_dataloader())

    def test_another_ignore_index_than_the_data_is_refused_before_training(self, trainer, mask_folders):
        data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32))
        with pytest.raises(ConfigError, match="Set `ignore_index` of the task to 255"):
            trainer().fit(SemanticSegmentationTask(tiny_segformer(3)), datamodule=data)

    @pytest.mark.parametrize("index", [0, 2])
    @pytest.mark.parametrize("names", [None, ["a", "b", "c"]], ids=["unnamed", "named"])
    def test_an_ignored_label_is_no_class(self, names, index):
        """Metrics would differ in whether it counts: pixels of it would not, predictions of it would."""
        said = f"ignore_index is {index}, which is the class '{(names or '012')[index]}'.*none of 0 to 2"
        with pytest.raises(ConfigError, match=said):
            SemanticSegmentationTask(tiny_segformer(3), ignore_index=index, class_names=names)
        with pytest.raises(ConfigError, match=said):
            ImageClassificationTask(tiny_vit(), ignore_index=index, class_names=names)

    def test_a_label_out_of_range_of_plain_pairs(self, trainer):
        loader = DataLoader(TensorDataset(torch.rand(3, 3, 16, 16), torch.tensor([0, 3, -1])), batch_size=3)
        with pytest.raises(DataError, match="Label -1, 3 in sample 1 of the batch, sample 2 of the batch"):
            trainer().validate(ImageClassificationTask(tiny_vit()), loader)

    def test_other_batches_are_refused(self, trainer):
        images = torch.rand(2, 3, 16, 16)
        loader = DataLoader(TensorDataset(images, torch.zeros(2), torch.zeros(2)))
        with pytest.raises(DataError, match="a pair"):
            trainer().validate(ImageClassificationTask(tiny_vit()), loader)

    def test_data_of_other_classes_are_refused_before_training(self, trainer):
        with pytest.raises(ConfigError, match=r"4 classes \(6, 7, 8, 9\).*num_classes=3"):
            trainer().fit(ImageClassificationTask(tiny_vit()), datamodule=digits(digits=[6, 7, 8, 9]))


KINDS = pytest.mark.parametrize(
    ("task_class", "model", "side", "shape"),
    [(ImageClassificationTask, tiny_vit(), 16, ()), (SemanticSegmentationTask, tiny_segformer(3), 32, (32, 32))],
    ids=["labels", "masks"],
)


@KINDS
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("weights", [None, [0.1, 3.0, 1.0]], ids=["alike", "weighed"])
def test_the_loss_of_a_split_is_the_same_in_any_batches(trainer, task_class, model, side, shape, weights, batch_size):
    task = task_class(model, class_weights=weights, label_smoothing=0.1, ignore_index=255)
    images, targets = torch.rand(7, 3, side, side), torch.randint(3, (7, *shape))
    targets[torch.rand(targets.shape) < torch.linspace(0, 1, 7).view(-1, *[1] * len(shape))] = 255
    targets[0], targets[-1] = 1, 255
    result, *_ = trainer().validate(task, DataLoader(TensorDataset(images, targets), batch_size=batch_size))
    with torch.inference_mode():
        logits = task.eval()(images).double()
    given = None if weights is None else torch.tensor(weights).double()
    whole = cross_entropy(logits, targets, given, ignore_index=255, label_smoothing=0.1)
    assert result["val/loss"] == pytest.approx(float(whole), rel=1e-6)


@KINDS
def test_the_loss_of_a_split_without_labels_is_nothing(trainer, task_class, model, side, shape):
    loader = DataLoader(TensorDataset(torch.rand(3, 3, side, side), torch.full((3, *shape), -100)), batch_size=2)
    assert trainer().validate(task_class(model), loader)[0]["val/loss"] == 0


def test_a_checkpoint_is_plain_and_gives_the_task_back(trainer, tmp_path):
    task, run = ImageClassificationTask(tiny_vit(), lr=0.5), trainer(max_steps=1)
    run.fit(task, datamodule=digits())
    run.save_checkpoint(tmp_path / "task.ckpt")
    torch.load(tmp_path / "task.ckpt", weights_only=True)
    again = ImageClassificationTask.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    assert again.model_config == task.model_config
    assert again.lr == 0.5
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.eval()(images), task.eval()(images))


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


@pytest.mark.parametrize("count", [1, 2])
def test_a_size_that_the_network_refuses_is_told_as_that(trainer, count):
    """timm asserts, torch raises: it is a size that the user chose, of the images or, for batch norm, of the batch."""
    loader = DataLoader(TensorDataset(torch.rand(2, 3, 20, 24), torch.tensor([0, 1])), batch_size=count)
    said = r"another data.init_args.image_size [^,]+" + r", a larger data.init_args.batch_size" * (count == 1)
    with pytest.raises(ConfigError, match=rf"fails on images of 20x24: .*choose {said}[^,]*, or another model"):
        trainer().validate(ImageClassificationTask(tiny_vit()), loader)


def test_images_of_which_nothing_is_left_are_refused_at_the_first_step(trainer):
    loader = DataLoader(TensorDataset(torch.rand(2, 3, 16, 16), torch.tensor([0, 1])), batch_size=2)
    task = ImageClassificationTask(ModelConfig("timm", "test_efficientnet", 2, "none"))
    with pytest.raises(ConfigError, match=r"too small for test_efficientnet: .*data.init_args.image_size"):
        trainer(max_steps=1).fit(task, loader, loader)
    assert not any(module._forward_hooks for module in task.network.modules())
