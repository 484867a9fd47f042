"""Segmentation in real runs of a Trainer."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins.tasks import (
    MaskFolderDataModule,
    ModelConfig,
    SemanticSegmentationTask,
)

from ..conftest import HALF, Recorder, scenes, tiny_segformer

IGNORED = 255


class TestSegmentation:
    def test_metrics_are_those_of_the_whole_split(self, trainer):
        """Against counts made here, over unequal batches, with ignored pixels and a class that never occurs."""
        images = torch.rand(5, 3, 32, 32)
        masks = torch.randint(0, 3, (5, 32, 32))  # of four classes
        masks[:2, :20] = IGNORED
        task = SemanticSegmentationTask(tiny_segformer(), ignore_index=IGNORED, class_names=["a", "b", "c", "d"])
        with torch.no_grad():
            task.network.decode_head.classifier.bias[3] = -100.0  # the absent class is never predicted
        seen = Recorder()
        loader = DataLoader(TensorDataset(images, masks), batch_size=2)
        (result,) = trainer(callbacks=[seen]).validate(task, loader, verbose=False)
        true, predicted = torch.cat(seen.true), torch.cat(seen.predicted)
        counts = true != IGNORED
        ious = []
        for label, name in enumerate("abc"):
            both = ((true == label) & (predicted == label) & counts).sum()
            either = (((true == label) | (predicted == label)) & counts).sum()
            ious.append(float(both / either))
            assert result[f"val/iou/{name}"] == pytest.approx(ious[-1])
        assert torch.isnan(torch.tensor(result["val/iou/d"]))
        assert result["val/mean_iou"] == pytest.approx(sum(ious) / 3)
        assert result["val/dice"] == pytest.approx(sum(2 * iou / (1 + iou) for iou in ious) / 3)
        assert result["val/pixel_accuracy"] == pytest.approx(float((true == predicted)[counts].float().mean()))

    def test_a_class_that_is_only_predicted_counts_as_missed(self, trainer):
        """Against scikit-learn, on known predictions: the strongest channel of each pixel."""
        from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

        torch.manual_seed(0)
        images, masks = torch.rand(5, 3, 8, 8), torch.randint(0, 2, (5, 8, 8))  # class 2 never occurs
        masks[:3, :5] = IGNORED
        small = ModelConfig("smp", "Unet", 3, "none", {"encoder_name": "tu-mobilenetv3_small_050"}, HALF, HALF)
        task = SemanticSegmentationTask(small, ignore_index=IGNORED, class_names=["a", "b", "c"])
        task.network = torch.nn.Identity()
        (result,) = trainer().validate(task, DataLoader(TensorDataset(images, masks), batch_size=2), verbose=False)
        counted = masks != IGNORED
        true, predicted = masks[counted], images.argmax(1)[counted]
        each = jaccard_score(true, predicted, average=None)
        assert [result[f"val/iou/{name}"] for name in "abc"] == pytest.approx(each.tolist())
        assert result["val/iou/c"] == 0
        assert result["val/mean_iou"] == pytest.approx(each.mean())
        assert result["val/dice"] == pytest.approx(f1_score(true, predicted, average="macro"))
        assert result["val/pixel_accuracy"] == pytest.approx(accuracy_score(true, predicted))
        assert task.confusion["val"].tolist() == confusion_matrix(true, predicted).tolist()

    @pytest.mark.parametrize("first", ["right", "wrong", "ignored"])
    def test_metrics_share_nothing_by_chance(self, trainer, first):
        """In whatever order batches come: in the first one, metrics may be equal that are not equal later."""
        from sklearn.metrics import accuracy_score, f1_score, jaccard_score

        torch.manual_seed(0)
        images, masks = torch.rand(6, 3, 8, 8), torch.randint(0, 3, (6, 8, 8))
        right = images[:2].argmax(1)
        masks[:2] = {"right": right, "wrong": (right + 1) % 3, "ignored": torch.full_like(right, IGNORED)}[first]
        task = SemanticSegmentationTask(tiny_segformer(), ignore_index=IGNORED)
        task.network, task.network_logits = torch.nn.Identity(), lambda _, pictures: pictures
        (result,) = trainer().validate(task, DataLoader(TensorDataset(images, masks), batch_size=2), verbose=False)
        true, predicted = masks[masks != IGNORED], images.argmax(1)[masks != IGNORED]
        assert result["val/mean_iou"] == pytest.approx(jaccard_score(true, predicted, average="macro"))
        assert result["val/dice"] == pytest.approx(f1_score(true, predicted, average="macro"))
        assert result["val/pixel_accuracy"] == pytest.approx(accuracy_score(true, predicted))

    def test_ignored_pixels_are_no_part_of_the_loss(self):
        task = SemanticSegmentationTask(tiny_segformer(), ignore_index=IGNORED)
        logits, mask = torch.randn(1, 4, 2, 2), torch.tensor([[[0, IGNORED], [2, IGNORED]]])
        alone = torch.nn.functional.cross_entropy(logits[..., 0], mask[..., 0])
        assert task.loss(logits, mask) == pytest.approx(float(alone))
        assert task.loss(logits, torch.full_like(mask, IGNORED)) == 0

    def test_logits_have_the_size_of_the_mask(self, trainer):
        loader = DataLoader(TensorDataset(torch.rand(2, 3, 32, 32), torch.randint(0, 4, (2, 64, 48))))
        trainer().validate(SemanticSegmentationTask(tiny_segformer()), loader, verbose=False)

    def test_fit_test_and_predict(self, trainer):
        task, run = SemanticSegmentationTask(tiny_segformer()), trainer()
        few = {"train_scenes": 6, "val_scenes": 5, "test_scenes": 4}
        run.fit(task, datamodule=scenes(**few))
        assert {"train/mean_iou", "val/mean_iou", "val/iou/ground", "val/iou/3"} <= set(run.callback_metrics)
        run.test(task, datamodule=scenes(**few), verbose=False)
        masks = torch.cat(run.predict(task, datamodule=scenes(**few)))
        assert masks.shape == (4, 64, 64)

    def test_folders_on_disk(self, trainer, mask_folders):
        data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32), batch_size=2)
        run = trainer()
        run.fit(SemanticSegmentationTask(tiny_segformer(3), ignore_index=IGNORED), datamodule=data)
        assert 0 <= run.callback_metrics["val/mean_iou"] <= 1
