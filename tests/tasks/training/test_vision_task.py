"""What all tasks share: labels are checked, checkpoints are plain."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    ImageClassificationTask,
    MaskFolderDataModule,
    ModelConfig,
    SemanticSegmentationTask,
)

from ..conftest import digits, tiny_segformer, tiny_vit


class TestLabels:
    def test_a_label_out_of_range_names_the_file(self, trainer, mask_folders):
        data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32), batch_size=4)
        data.setup("fit")
        task = SemanticSegmentationTask(tiny_segformer(3))  # whose ignore_index is not that of the data
        with pytest.raises(DataError, match=r"Label 255 in .*masks.train.\d\.png.*labels are 0 to 2, or -100"):
            trainer().fit(task, data.train_dataloader(), data.val_dataloader())

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


def test_images_of_which_nothing_is_left_are_refused_at_the_first_step(trainer):
    loader = DataLoader(TensorDataset(torch.rand(2, 3, 16, 16), torch.tensor([0, 1])), batch_size=2)
    task = ImageClassificationTask(ModelConfig("timm", "test_efficientnet", 2, "none"))
    with pytest.raises(ConfigError, match=r"too small for test_efficientnet: .*data.init_args.image_size"):
        trainer(max_steps=1).fit(task, loader, loader)
    assert not any(module._forward_hooks for module in task.network.modules())
