"""The picture of predicted masks."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import (
    DigitsDataModule,
    ImageClassificationTask,
    PredictionPicture,
    SemanticSegmentationTask,
    draw_predictions,
)
from tests.slow import slow_but

from ..conftest import scenes, tiny_segformer, tiny_vit


class TestPicture:
    def test_it_is_written_when_the_fit_ends_and_its_place_is_printed(self, trainer, tmp_path, capsys):
        path = tmp_path / "new folder" / "seen.png"
        run = trainer(callbacks=[PredictionPicture(str(path), samples=3)])
        run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes(val_scenes=5))
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.height > picture.width * 0.75  # three rows of four
        assert str(path) in capsys.readouterr().out

    @pytest.mark.parametrize("first", slow_but([True, False], [True]), ids=["the picture first", "the adapter first"])
    def test_it_shows_the_weights_that_the_fit_leaves(self, first, trainer, tmp_path):
        """The checkpoint takes the largest loss for the best: the first weights, which still see class 2 everywhere."""
        torch.manual_seed(0)
        picture = PredictionPicture(str(tmp_path / "p.png"))
        best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max")
        config = LoraConfig(r=2, target_modules=["v_proj"])
        adapter = LoraCallback(config, target="network", merge_source="best", merge_on_fit_end=True)
        callbacks = [picture, adapter, best] if first else [adapter, best, picture]
        task, data = SemanticSegmentationTask(tiny_segformer(), lr=0.1), scenes(val_scenes=5)
        with torch.no_grad():
            task.network.decode_head.classifier.bias[2] = 1.0
        trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing=True).fit(task, datamodule=data)
        again = draw_predictions(task, data.val_dataloader(), [0, 1, 3, 4], tmp_path / "again.png")
        assert np.array_equal(*(np.asarray(Image.open(path)) for path in (picture.path, again)))

    def test_a_trial_of_the_code_leaves_none(self, trainer, tmp_path):
        run = trainer(callbacks=[PredictionPicture(str(tmp_path / "p.png"))], fast_dev_run=True)
        run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes(val_scenes=5))
        assert not (tmp_path / "p.png").exists()

    @pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_val_batches": 0}], ids=str)
    def test_where_nothing_was_validated_there_is_none(self, options, trainer, tmp_path):
        run = trainer(callbacks=[PredictionPicture(str(tmp_path / "p.png"))], **options)
        with pytest.warns(UserWarning, match="There is no picture of predictions: this fit validated nothing"):
            run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes(val_scenes=5))
        assert not (tmp_path / "p.png").exists()

    def test_it_shows_the_colors_of_the_classes(self, tmp_path):
        """A network that always answers class 2 is drawn in its color in the third of four columns."""
        task, data = SemanticSegmentationTask(tiny_segformer(), ignore_index=255), scenes(val_scenes=5)
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

    def test_a_place_that_cannot_be_written_is_refused_before_training(self, trainer, tmp_path):
        (tmp_path / "file").touch()
        run = trainer(callbacks=[PredictionPicture(str(tmp_path / "file" / "p.png"))])
        with pytest.raises(ConfigError, match=r"path of PredictionPicture is .* is a file"):
            run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes(val_scenes=5))
        assert run.global_step == 0

    def test_it_shows_at_least_one_sample(self):
        with pytest.raises(ConfigError, match="at least 1"):
            PredictionPicture("p.png", samples=0)
