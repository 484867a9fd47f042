"""The line that loads a checkpoint, pasted into another program."""

import inspect
import runpy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.checkpoint.checkpoint_cases import shown_by_lightning
from tests.integrations.lightning.toys import Classifier, loader, lora, trainer

PROGRAM = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback


class Fitted(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, _):
        return self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    torch.manual_seed(0)
    lora = LoraCallback(LoraConfig(r=2, init="none"), merge_on_fit_end=False, print_plan=False)
    trainer = Trainer(
        callbacks=[lora], max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False
    )
    module = Fitted()
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2))
"""


def test_a_class_of_a_program_is_imported_from_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fitting.py").write_text(PROGRAM)
    fitted = runpy.run_path("fitting.py", run_name="__main__")["module"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "load_from_checkpoint" in line]
    assert "from fitting import Fitted" in line
    pasted = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the base, which the file does not hold
        exec(line, pasted)
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(pasted["module"].state_dict()[name], tensor)


class OfOneArgument(Classifier):
    """Takes all its hyperparameters as one argument."""

    def __init__(self, conf):
        super().__init__()

    def save_hyperparameters(self):
        frame = inspect.currentframe().f_back.f_back
        super().save_hyperparameters(frame.f_locals["conf"], frame=frame)


class OfKeywords(Classifier):
    def __init__(self, **given):
        super().__init__()


@pytest.mark.parametrize(
    "make", [Classifier, lambda: OfOneArgument({"depth": 3}), lambda: OfKeywords(depth=3)], ids=["named", "one", "any"]
)
def test_error_of_lightning_shows_the_line(tmp_path, make):
    module = make()
    trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path, filename="it")]).fit(module, loader())
    with shown_by_lightning(rf"module = load_from_checkpoint\({type(module).__name__}, path\)"):
        type(module).load_from_checkpoint(tmp_path / "it.ckpt")
    again = load_from_checkpoint(type(module), tmp_path / "it.ckpt")
    assert again.hparams == module.hparams
    assert again._hparams_name == module._hparams_name


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")  # pytest has arguments of its own
def test_what_a_command_line_gives_beside_the_arguments_that_it_knows(tmp_path):
    model = {"class_path": f"{__name__}.OfKeywords", "dict_kwargs": {"depth": 3}}
    arguments = {"seed_everything": 1, "model": model}
    options = {"auto_configure_optimizers": False, "save_config_callback": None, "args": arguments}
    module = LightningCLI(Classifier, run=False, subclass_mode_model=True, **options).model
    trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path, filename="it")]).fit(module, loader())
    again = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
    assert type(again) is OfKeywords
    assert again.hparams["depth"] == 3
