"""What a fit leaves to look at: the table of metrics before and after, and the picture of predictions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    BeforeAfter,
    CpuThreads,
    DataError,
    DigitScenesDataModule,
    DigitsDataModule,
    ImageClassificationTask,
    PredictionPicture,
    SemanticSegmentationTask,
    draw_predictions,
)

from .conftest import tiny_segformer, tiny_vit


def scenes():
    return DigitScenesDataModule([1, 2, 3], train_scenes=4, val_scenes=5, batch_size=2)


class TestBeforeAfter:
    def test_it_prints_the_metrics_of_the_whole_split(self, trainer, capsys):
        task, data, table = ImageClassificationTask(tiny_vit(), lr=3e-3), DigitsDataModule([0, 1, 2]), BeforeAfter()
        (before,) = trainer().validate(task, datamodule=data, verbose=False)
        run = trainer(callbacks=[table], num_sanity_val_steps=-1, max_epochs=2)
        run.fit(task, datamodule=data)
        assert table.before == pytest.approx(before)
        assert table.after == {name: float(v) for name, v in run.callback_metrics.items() if name.startswith("val/")}
        printed = capsys.readouterr().out
        for name in ("accuracy", "f1", "loss"):
            assert f"{table.before[f'val/{name}']:.4f}" in printed
            assert f"{table.after[f'val/{name}']:.4f}" in printed

    def test_a_partial_check_before_training_is_refused(self, trainer):
        run = trainer(callbacks=[BeforeAfter()], num_sanity_val_steps=2)
        with pytest.raises(ConfigError, match="num_sanity_val_steps to -1"):
            run.fit(ImageClassificationTask(tiny_vit()), datamodule=DigitsDataModule([0, 1, 2]))

    def test_a_fast_development_run_has_no_before(self, trainer, capsys):
        table = BeforeAfter()
        trainer(callbacks=[table], fast_dev_run=1).fit(
            ImageClassificationTask(tiny_vit()), datamodule=DigitsDataModule([0, 1, 2])
        )
        assert table.before == {}
        assert "accuracy" in capsys.readouterr().out


class TestPicture:
    def test_it_is_written_when_the_fit_ends_and_its_place_is_printed(self, trainer, tmp_path, capsys):
        path = tmp_path / "new folder" / "seen.png"
        run = trainer(callbacks=[PredictionPicture(str(path), samples=3)])
        run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.height > picture.width * 0.75  # three rows of four
        assert str(path) in capsys.readouterr().out

    def test_it_shows_the_colors_of_the_classes(self, tmp_path):
        """A network that always answers class 2 is drawn in its color in the third of four columns."""
        task, data = SemanticSegmentationTask(tiny_segformer(), ignore_index=255), scenes()
        with torch.no_grad():
            task.network.decode_head.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1e3, 0.0]))
        data.setup("fit")
        before = {name: module.training for name, module in task.named_modules()}
        path = draw_predictions(task, data.val_dataloader(), [0, 4], tmp_path / "p.png")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        third_column = pixels[:, int(pixels.shape[1] * 0.52) : int(pixels.shape[1] * 0.73)].reshape(-1, 3)
        colors, counts = np.unique(third_column, axis=0, return_counts=True)
        assert colors[counts.argmax()].max() > colors[counts.argmax()].min() + 100
        assert {name: module.training for name, module in task.named_modules()} == before

    def test_only_segmentation_has_one(self, trainer, tmp_path):
        run = trainer(callbacks=[PredictionPicture(str(tmp_path / "p.png"))])
        with pytest.raises(ConfigError, match="ImageClassificationTask is no SemanticSegmentationTask"):
            run.fit(ImageClassificationTask(tiny_vit()), datamodule=DigitsDataModule([0, 1, 2]))

    def test_it_shows_at_least_one_sample(self):
        with pytest.raises(ConfigError, match="at least one"):
            PredictionPicture("p.png", samples=0)


class TestThreads:
    @pytest.mark.parametrize("label", [0, 7], ids=["a fit that ends", "a fit that fails"])
    def test_they_are_set_for_the_fit_alone(self, trainer, label):
        seen = []
        task = ImageClassificationTask(tiny_vit())
        task.network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        loader = DataLoader(TensorDataset(torch.rand(2, 3, 16, 16), torch.tensor([0, label])), batch_size=1)
        before = torch.get_num_threads()
        try:
            trainer(callbacks=[CpuThreads(before + 1)]).fit(task, loader, loader)
        except DataError:
            assert label == 7
        assert set(seen) == {before + 1}
        assert torch.get_num_threads() == before

    def test_at_least_one(self):
        with pytest.raises(ConfigError, match="at least one"):
            CpuThreads(0)
