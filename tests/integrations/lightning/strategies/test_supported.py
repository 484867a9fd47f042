"""Trainers and strategies that an adapter would not survive are refused by name."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from lora_plugins import StateError
from lora_plugins.integrations.lightning.strategies import check_strategy
from tests.integrations.lightning.toys import Classifier, loader, lora


def test_trainer_of_the_other_namespace(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    body = {name: value for name, value in vars(Classifier).items() if callable(value) and name != "__init__"}
    module = type("Other", (other.LightningModule,), body)()
    module.net = Classifier().net
    run = other.Trainer(
        callbacks=[lora()],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(StateError, match=r"from lightning\.pytorch"):
        run.fit(module, loader())


def test_deepspeed_is_refused_by_name():
    engine = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # it cannot be made without a GPU and the package
    with pytest.raises(StateError, match="does not support DeepSpeedStrategy"):
        check_strategy(SimpleNamespace(strategy=engine), {})
