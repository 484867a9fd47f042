"""Images in TensorBoard."""

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    SemanticSegmentationTask,
    TensorBoardImages,
)

from ..conftest import scenes, tiny_segformer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_has_curves_and_pictures(trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(logger=logger, callbacks=[TensorBoardImages(samples=2)], max_epochs=2, log_every_n_steps=1)
    run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert {"val/mean_iou", "val/iou/ground", "train/loss"} <= set(events.Tags()["scalars"])
    for name in ("val/examples", "val/confusion"):
        assert len(events.Images(name)) == 2


def test_pictures_are_not_lost_in_another_logger(trainer, tmp_path):
    run = trainer(logger=CSVLogger(tmp_path), callbacks=[TensorBoardImages()])
    with pytest.raises(ConfigError, match="needs a TensorBoardLogger"):
        run.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())
