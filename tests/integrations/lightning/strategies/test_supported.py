"""Trainers and strategies that an adapter would not survive are refused by name."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy

from lora_plugins import StateError
from lora_plugins.integrations.lightning.strategies import check_strategy
from tests.integrations.lightning.toys import Classifier, differing, loader, lora, trainer, values


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


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_pruning_is_refused_by_name(tmp_path, first):
    pruning = type("MyPruning", (ModelPruning,), {})("l1_unstructured", amount=0.5)
    callbacks = [pruning, lora()]
    module = Classifier()
    before = values(module)
    with pytest.raises(StateError, match="MyPruning puts masked weights"):
        trainer(tmp_path, callbacks if first else callbacks[::-1]).fit(module, loader())
    assert not differing(before, values(module))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by which tensorboard makes it
def test_the_graph_of_an_adapted_module_is_logged(tmp_path):
    pytest.importorskip("tensorboard")
    module = Classifier()
    module.example_input_array = torch.randn(2, 4)
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    trainer(tmp_path, [lora()], logger=logger).fit(module, loader())
    assert next(tmp_path.rglob("events.out*")).stat().st_size > 1000
