"""The same small file on every path on which Lightning saves."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import load_from_checkpoint
from lora_plugins.integrations.lightning.checkpoint import KEY
from tests.integrations.lightning.checkpoint.checkpoint_cases import ADAPTER_KEYS, PATHS
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values


@pytest.mark.parametrize("save", PATHS.values(), ids=PATHS.keys())
def test_every_path_saves_the_same_keys_that_load_without_unpickling(save, tmp_path):
    checkpoint = load(save(tmp_path))
    assert set(checkpoint["state_dict"]) == ADAPTER_KEYS
    assert checkpoint[KEY]["format"] == 1
    assert set(checkpoint[KEY]["left_out"]) == set(Classifier().state_dict())
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


def test_file_is_little_more_than_the_trained_bytes(tmp_path):
    """Wide layers, so that what a checkpoint of Lightning holds besides tensors does not count."""

    class Wide(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    module = Wide(width=40_000)
    run = trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path, filename="it")], max_epochs=1)
    run.fit(module, loader())
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    assert (tmp_path / "it.ckpt").stat().st_size <= 1.1 * trained


CHOICES = {
    "none": (LoraConfig(r=2, target_modules=["net.0"]), set()),
    "all": (
        LoraConfig(r=2, target_modules=["net.0"], bias="all"),
        {"net.0.bias", "net.1.bias", "net.3.bias"},
    ),
    "lora_only": (LoraConfig(r=2, target_modules=["net.0"], bias="lora_only"), {"net.0.bias"}),
    "head": (LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"]), {"net.3.weight", "net.3.bias"}),
    "tracked_norm": (
        LoraConfig(r=2, target_modules=["net.0"], norm="track"),
        {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"},
    ),
}


@pytest.mark.parametrize(("config", "own"), CHOICES.values(), ids=CHOICES.keys())
def test_what_is_trained_is_saved_and_nothing_else_moves(config, own, tmp_path):
    module = Classifier()
    before = values(module)
    run = trainer(tmp_path, [lora(config)])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    factors = {"net.0.lora_A.default", "net.0.lora_B.default"}
    assert set(load(tmp_path / "it.ckpt")["state_dict"]) == own | factors
    assert differing(before, values(module)) == own | factors
    assert not differing(values(module), values(load_from_checkpoint(Classifier, tmp_path / "it.ckpt")))


def test_base_changed_by_loftq_is_rebuilt_and_not_stored(tmp_path):
    config = LoraConfig(r=2, target_modules=["net.0"], init="loftq")
    module = Classifier()
    run = trainer(tmp_path, [lora(config)])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert "net.0.weight" not in load(tmp_path / "it.ckpt")["state_dict"]
    assert not differing(values(module), values(load_from_checkpoint(Classifier, tmp_path / "it.ckpt")))
    again = Classifier()
    trainer(tmp_path, [lora(config)]).test(again, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert not differing(values(module), values(again))


KILLED = """
import sys, torch
from lightning.pytorch import Trainer
from tests.integrations.lightning.toys import Classifier, loader, lora, trainer
run = trainer(sys.argv[1], [lora()], max_epochs=1)
run.fit(Classifier(width=20_000), loader())
print("ready", flush=True)
while True:
    run.save_checkpoint(sys.argv[1] + "/it.ckpt")
"""


@pytest.mark.slow
def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while b"ready" not in process.stdout.readline():
            assert process.poll() is None
        while not (tmp_path / "it.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert set(load(tmp_path / "it.ckpt")["state_dict"]) == ADAPTER_KEYS


class Fills(SingleDeviceStrategy):
    """Writes to a disk that is full before its second file is whole."""

    room = 2

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self.room -= 1
        if self.room <= 0:
            Path(filepath).write_bytes(b"as much as fits")
            moved = "/tmp/tmp1234", None, str(Path(filepath).absolute())  # as fsspec says it
            raise OSError(errno.ENOSPC, "No space left on device", *moved)


@pytest.mark.parametrize("place", ["absolute", "relative"])
def test_a_full_disk_keeps_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    path = Path("it.ckpt") if place == "relative" else tmp_path / "it.ckpt"
    run = trainer(tmp_path, [lora()], strategy=Fills(torch.device("cpu")))
    run.fit(Classifier(), loader())
    run.save_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"No space left on device: '[^']*it\.ckpt'$"):
        run.save_checkpoint(path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"it.ckpt": before}


def test_two_callbacks_on_two_submodules_share_one_file(tmp_path):
    module = Classifier()
    module.net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "b": nn.Sequential(nn.Linear(8, 3))})
    module.forward = lambda x: module.net["b"](module.net["a"](x))

    def pair():
        return [lora(LoraConfig(r=2), target=f"net.{name}") for name in "ab"]

    run = trainer(tmp_path, pair())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = load(tmp_path / "it.ckpt")
    assert [adapter["target"] for adapter in checkpoint[KEY]["adapters"]] == ["net.a", "net.b"]
    assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if ".lora_B." in name)
    trainer(tmp_path, pair(), max_epochs=3).fit(module, loader(), ckpt_path=tmp_path / "it.ckpt")
