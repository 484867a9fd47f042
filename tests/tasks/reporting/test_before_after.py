"""The table of metrics before and after a fit."""

import pytest

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    BeforeAfter,
    DigitsDataModule,
    ImageClassificationTask,
    MaskFolderDataModule,
    SemanticSegmentationTask,
)

from ..conftest import tiny_segformer, tiny_vit


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

    def test_names_of_classes_are_printed_as_they_are(self, trainer, mask_folders, capsys):
        """rich takes what is in brackets for a style, and what is in colons for a picture."""
        names = ["[void]", "[/road]", ":car:"]
        data = MaskFolderDataModule(str(mask_folders), classes=names, image_size=(32, 32))
        task = SemanticSegmentationTask(tiny_segformer(3), ignore_index=255)
        trainer(callbacks=[BeforeAfter()], fast_dev_run=1).fit(task, datamodule=data)
        printed = capsys.readouterr().out
        assert [name for name in names if f" iou/{name} " not in printed] == []
