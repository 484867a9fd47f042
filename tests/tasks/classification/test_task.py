"""Classification in real runs of a Trainer."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DigitsDataModule,
    ImageClassificationTask,
    ImageFolderDataModule,
    warmup_cosine,
)

from ..conftest import Recorder, digits, tiny_vit


def digits_of(split):
    data = digits()
    data.setup("fit")
    return data.splits[split]


class FirstChannel(torch.nn.Module):
    """Takes the first channel of images that are as tall as there are classes for the logits, times four."""

    def forward(self, images):
        return 4 * images[:, 0, :, 0]


def expected_calibration_error(shares, true, bins):
    """Guo et al., arXiv 1706.04599, equation 3: by how much sureness and accuracy differ, mean over samples in bins."""
    sure, right = shares.max(1).values, (shares.argmax(1) == true).float()
    total = 0.0
    for i in range(bins):
        inside = (sure > i / bins) & (sure <= (i + 1) / bins)
        total += float((right[inside].sum() - sure[inside].sum()).abs())
    return total / len(true)


class TestClassification:
    def test_a_fit_learns_real_digits(self, trainer):
        task = ImageClassificationTask(tiny_vit(), lr=5e-3, lr_scheduler=warmup_cosine)
        run = trainer(max_epochs=20)  # after 12, some seeds and processors are below
        run.fit(task, datamodule=digits(batch_size=16))
        assert run.callback_metrics["val/accuracy"] > 0.8
        assert task.class_names == ["0", "1", "2"]

    def test_metrics_are_those_of_the_whole_split(self, trainer):
        from sklearn.metrics import accuracy_score, f1_score

        task, seen = ImageClassificationTask(tiny_vit()), Recorder()
        (result,) = trainer(callbacks=[seen]).validate(task, datamodule=digits(batch_size=7), verbose=False)
        true, predicted = torch.cat(seen.true), torch.cat(seen.predicted)
        assert result["val/accuracy"] == pytest.approx(accuracy_score(true, predicted))
        assert result["val/f1"] == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))

    def test_probabilities_are_judged_over_the_whole_split(self, trainer):
        """Against scikit-learn and counts made here: unequal batches, a class that never occurs, and ignored labels."""
        from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

        torch.manual_seed(1)
        images, labels = torch.rand(61, 3, 7, 1), torch.arange(61) % 6
        task = ImageClassificationTask(tiny_vit(7))
        task.network = FirstChannel()
        images[torch.arange(61), 0, labels] += 0.4  # right more often than not, and more sure of some than of others
        labels[::9] = task.ignore_index
        (result,) = trainer().validate(task, DataLoader(TensorDataset(images, labels), batch_size=7), verbose=False)
        counted = labels != task.ignore_index
        shares, true = task(images).softmax(1)[counted], labels[counted]
        predicted = shares.argmax(1)
        assert 0.3 < result["val/accuracy"] < 0.9
        assert result["val/accuracy"] == pytest.approx(float((predicted == true).float().mean()))
        assert result["val/f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
        each = [roc_auc_score(true == i, shares[:, i]) for i in range(6)]
        assert result["val/auroc"] == pytest.approx(sum(each) / 6)
        best = shares.topk(5, dim=1).indices
        assert result["val/top5"] == pytest.approx(float((best == true[:, None]).any(1).float().mean()))
        assert result["val/calibration_error"] == pytest.approx(expected_calibration_error(shares, true, bins=15))
        expected = confusion_matrix(true, predicted, labels=range(7))
        assert task.confusion["val"].tolist() == expected.tolist()

    @pytest.mark.parametrize("first", ["right", "wrong", "second best", "one class"])
    def test_metrics_share_nothing_by_chance(self, trainer, first):
        """In whatever order batches come: in the first one, metrics may be equal that are not equal later."""
        torch.manual_seed(2)
        images, labels = torch.rand(64, 3, 7, 1), torch.arange(64) % 7
        best = images[:, 0, :, 0].topk(2, dim=1).indices
        place = {"right": best[:, 0] != labels, "wrong": best[:, 0] == labels, "second best": best[:, 1] != labels}
        order = place.get(first, labels).float().argsort(stable=True)
        images, labels, best = images[order], labels[order], images[order, 0, :, 0].topk(5, dim=1).indices
        task = ImageClassificationTask(tiny_vit(7))
        task.network = FirstChannel()
        (result,) = trainer().validate(task, DataLoader(TensorDataset(images, labels), batch_size=4), verbose=False)
        assert result["val/accuracy"] == pytest.approx(float((best[:, 0] == labels).float().mean()))
        assert result["val/top5"] == pytest.approx(float((best == labels[:, None]).any(1).float().mean()))
        assert result["val/top5"] > result["val/accuracy"]

    def test_folders_on_disk(self, trainer, class_folders):
        task = ImageClassificationTask(tiny_vit(2))
        run = trainer()
        run.fit(task, datamodule=ImageFolderDataModule(str(class_folders), image_size=(16, 16), batch_size=4))
        assert 0 <= run.callback_metrics["val/accuracy"] <= 1

    def test_prediction_gives_labels(self, trainer):
        labels = torch.cat(trainer().predict(ImageClassificationTask(tiny_vit()), datamodule=digits()))
        assert labels.shape == (len(digits_of("test")),)
        assert set(labels.tolist()) <= {0, 1, 2}

    def test_the_test_split(self, trainer):
        (result,) = trainer().test(ImageClassificationTask(tiny_vit()), datamodule=digits(), verbose=False)
        assert set(result) == {f"test/{name}" for name in ("loss", "accuracy", "f1", "auroc", "calibration_error")}


class TestMixing:
    def test_it_trains_with_shares_of_classes(self, trainer):
        task = ImageClassificationTask(tiny_vit(), mixup=0.8, cutmix=1.0, label_smoothing=0.1)
        images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
        mixed, shares = task.mixup(images, labels)
        assert shares.shape == (8, 3)
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        assert not torch.equal(mixed, images)
        trainer().fit(task, datamodule=DigitsDataModule([0, 1, 2]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"mixup": 0.2, "loss": "focal"}, "only cross_entropy"), ({"mixup": -1.0}, "at least 0")],
        ids=["focal", "negative"],
    )
    def test_what_does_not_go_together(self, options, message):
        with pytest.raises(ConfigError, match=message):
            ImageClassificationTask(tiny_vit(), **options)
