"""Tasks in real runs of a Trainer: metrics, labels, optimizers, checkpoints, prediction."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DataError,
    DigitScenesDataModule,
    DigitsDataModule,
    ImageClassificationTask,
    ImageFolderDataModule,
    MaskFolderDataModule,
    ModelConfig,
    SemanticSegmentationTask,
)

from .conftest import HALF, tiny_segformer, tiny_vit

IGNORED = 255


def digits(**changes):
    return DigitsDataModule(**({"digits": [0, 1, 2]} | changes))


def scenes():
    return DigitScenesDataModule([1, 2, 3], train_scenes=6, val_scenes=5, test_scenes=4, batch_size=2)


class Recorder(Callback):
    """Keeps what the network says of every validation batch."""

    def __init__(self):
        self.predicted, self.true, self.losses = [], [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        images, targets = (batch["image"], batch["target"]) if isinstance(batch, dict) else batch
        self.predicted.append(pl_module(images).argmax(1))
        self.true.append(targets)


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
        task = ImageClassificationTask(tiny_vit(), lr=5e-3, schedule="cosine", warmup=0.1)
        run = trainer(max_epochs=12)
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


def digits_of(split):
    data = digits()
    data.setup("fit")
    return data.splits[split]


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
        run.fit(task, datamodule=scenes())
        assert {"train/mean_iou", "val/mean_iou", "val/iou/ground", "val/iou/3"} <= set(run.callback_metrics)
        run.test(task, datamodule=scenes(), verbose=False)
        masks = torch.cat(run.predict(task, datamodule=scenes()))
        assert masks.shape == (4, 64, 64)

    def test_folders_on_disk(self, trainer, mask_folders):
        data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=(32, 32), batch_size=2)
        run = trainer()
        run.fit(SemanticSegmentationTask(tiny_segformer(3), ignore_index=IGNORED), datamodule=data)
        assert 0 <= run.callback_metrics["val/mean_iou"] <= 1


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


class TestOptimizer:
    def test_it_holds_what_requires_gradients(self, trainer):
        task = ImageClassificationTask(tiny_vit())
        for parameter in task.parameters():
            parameter.requires_grad_(False)
        task.network.head.requires_grad_(True)
        before = {name: p.clone() for name, p in task.named_parameters()}
        run = trainer(max_steps=2)
        run.fit(task, datamodule=digits())
        (optimizer,) = run.optimizers
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in task.network.head.parameters()}
        moved = {name for name, p in task.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"network.head.weight", "network.head.bias"}

    def test_the_rate_rises_and_falls(self, trainer):
        class Rates(Callback):
            def __init__(self):
                self.seen = []

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        rates = Rates()
        task = ImageClassificationTask(tiny_vit(), lr=1.0, schedule="cosine", warmup=0.25)
        trainer(max_steps=8, max_epochs=-1, callbacks=[rates]).fit(task, datamodule=digits())
        assert rates.seen[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
        assert rates.seen[2:] == sorted(rates.seen[2:], reverse=True)
        assert rates.seen[-1] < 0.1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"schedule": "cosin"}, "Did you mean 'cosine'"), ({"warmup": 1.5}, "share of all steps")],
        ids=["schedule", "warmup"],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            ImageClassificationTask(tiny_vit(), **arguments)

    def test_as_many_names_as_classes(self):
        with pytest.raises(ConfigError, match="2 class_names"):
            ImageClassificationTask(tiny_vit(), class_names=["a", "b"])


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


def test_shipped_weights_know_what_they_were_trained_for(trainer):
    """The shipped backbones, on what they were trained for: far above chance, which is one in four."""
    from lora_plugins.tasks.examples import DIGITS, RECIPES, architecture

    for name, recipe in RECIPES.items():
        data = recipe.data()
        classes = len(data.class_names)
        model = architecture(recipe.configuration, num_classes=classes, weights=f"package:{name}")
        task = recipe.task(model)
        assert task.head_modules == ()
        (result,) = trainer().validate(task, datamodule=data, verbose=False)
        assert len(DIGITS) == 4
        assert result[f"val/{task.main_metric}"] > 0.9
