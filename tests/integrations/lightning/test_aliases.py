"""Modules of packages that import `pytorch_lightning`, with a Trainer and a callback of `lightning`."""

import os
import subprocess
import sys
from types import ModuleType

import pytest

from lora_plugins import StateError
from lora_plugins.integrations.lightning import alias_pytorch_lightning

pytest.importorskip("pytorch_lightning")

FOREIGN = """
import torch
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_only

class Module(pl.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
        return torch.utils.data.DataLoader(data, batch_size=4)
"""

ALIAS = "from lora_plugins.integrations.lightning import alias_pytorch_lightning; alias_pytorch_lightning()\n"

FIT = """
import lightning.pytorch, foreign
from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", max_epochs=1)
lora = LoraCallback(LoraConfig(r=2), merge_on_fit_end=False, print_plan=False)
run = TRAINER(callbacks=[lora, foreign.ModelCheckpoint("ck", filename="it")], **quiet)
module = foreign.Module()
run.fit(module)
again = load_from_checkpoint(foreign.Module, "ck/it.ckpt")
assert all((a == b).all() for a, b in zip(module.parameters(), again.parameters(), strict=True))
"""


def run(tmp_path, code, *arguments):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    command = [sys.executable, "-W", "ignore", *(["-c", code] if code else []), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["lightning.pytorch.Trainer", "foreign.pl.Trainer"])
def test_one_call_makes_them_the_same(trainer, tmp_path):
    done = run(tmp_path, ALIAS + FIT.replace("TRAINER", trainer))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_modules_are_the_same_objects_and_keep_their_names(tmp_path):
    code = ALIAS + (
        "import lightning.pytorch, pytorch_lightning, pytorch_lightning.utilities.rank_zero as zero\n"
        "import lightning_fabric.utilities.seed, importlib\n"
        "assert pytorch_lightning is lightning.pytorch\n"
        "assert zero is lightning.pytorch.utilities.rank_zero\n"
        "assert lightning_fabric.utilities.seed is importlib.import_module('lightning.fabric.utilities.seed')\n"
        "assert lightning.pytorch.__spec__.name == 'lightning.pytorch'\n"
        "importlib.reload(lightning.pytorch)\n"
        "alias_pytorch_lightning()\n"
        "try:\n    import pytorch_lightning.nothing\n"
        "except ModuleNotFoundError as error:\n    assert error.name == 'pytorch_lightning.nothing'\n"
        "else:\n    raise AssertionError\n"
    )
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr


def test_too_late_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    with pytest.raises(StateError, match="pytorch_lightning has been imported already"):
        alias_pytorch_lightning()


@pytest.mark.slow
def test_without_it_the_call_is_named(tmp_path):
    done = run(tmp_path, FIT.replace("TRAINER", "foreign.pl.Trainer"))
    assert "alias_pytorch_lightning()" in done.stderr


@pytest.mark.slow
def test_a_block_leaves_nothing(tmp_path):
    code = (
        "import sys, lightning.pytorch\n"
        "from lora_plugins.integrations.lightning.aliases import pytorch_lightning_aliased\n"
        "with pytorch_lightning_aliased():\n"
        "    import pytorch_lightning.callbacks as inner\n"
        "assert inner is lightning.pytorch.callbacks\n"
        "assert 'pytorch_lightning' not in sys.modules\n"
        "import pytorch_lightning\n"
        "assert pytorch_lightning is not lightning.pytorch\n"
        "with pytorch_lightning_aliased():\n"
        "    import pytorch_lightning as again\n"
        "assert again is pytorch_lightning\n"
    )
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_line_does_it_by_itself(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: {class_path: foreign.Module}\nlora: {r: 2}\ntrainer: {max_epochs: 1, accelerator: cpu, logger: false}\n"
    )
    done = run(tmp_path, "", "-m", "lora_plugins", "fit", "--config", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "layers adapted" in done.stdout


def test_the_line_that_loads_a_checkpoint_works_in_a_new_program(tmp_path):
    code = FIT.replace("TRAINER", "lightning.pytorch.Trainer") + (
        "from lora_plugins.integrations.lightning.checkpoint.rebuilding import rebuilding_line\n"
        "print('LINE ' + rebuilding_line(module, 'ck/it.ckpt'))\n"
    )
    fitted = run(tmp_path, ALIAS + code)
    assert fitted.returncode == 0, fitted.stderr
    (line,) = [each.removeprefix("LINE ") for each in fitted.stdout.splitlines() if each.startswith("LINE ")]
    again = run(tmp_path, f"{line}; import lightning.pytorch as pl; assert isinstance(module, pl.LightningModule)")
    assert again.returncode == 0, again.stderr
