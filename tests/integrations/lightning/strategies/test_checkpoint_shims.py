"""Where checkpoints are written, and what is left of loading them."""

import copy
import os
import pickle
import shutil
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lora_plugins import LoraModel
from lora_plugins.integrations.lightning import load_from_checkpoint
from lora_plugins.testing.full_disk import no_file_beyond
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values


def test_a_file_system_that_only_fsspec_knows_has_a_whole_file(tmp_path):
    module, fresh = Classifier(), Classifier()
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint("memory://it.ckpt")
    trainer(tmp_path, [lora()]).validate(fresh, loader(), ckpt_path="memory://it.ckpt")
    assert not differing(values(fresh), values(module))


class Refuses(Classifier):
    """Refuses each file."""

    def on_load_checkpoint(self, checkpoint):
        raise ValueError("not this one")


def test_a_hook_that_refuses_a_file_is_the_modules_own_again(tmp_path):
    run, module = trainer(tmp_path, [lora()], max_epochs=1), Refuses()
    run.fit(Refuses(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(ValueError, match="not this one"):
        trainer(tmp_path, [lora()]).test(module, loader(), ckpt_path=tmp_path / "it.ckpt")
    assert "on_load_checkpoint" not in vars(module)


class LeavesCopies(SingleDeviceStrategy):
    """Keeps what a process would leave that is killed before a file is whole."""

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        super().save_checkpoint(checkpoint, filepath, storage_options)
        folder = Path(filepath).parent
        shutil.copytree(folder, folder.with_name("left"), dirs_exist_ok=True)


def test_a_requeued_job_goes_on_from_the_last_whole_file(tmp_path):
    run = trainer(tmp_path, [lora()], strategy=LeavesCopies(torch.device("cpu")), max_epochs=1)
    run.fit(Classifier(), loader())
    for number in (1, 2):  # as for SIGUSR1 of SLURM
        run.save_checkpoint(tmp_path / "job" / f"hpc_ckpt_{number}.ckpt")
    again = trainer(tmp_path / "left", [lora()])
    again.fit(Classifier(), loader(), ckpt_path="hpc")
    assert again.ckpt_path == str(tmp_path / "left" / "hpc_ckpt_1.ckpt")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o664], ids=oct)
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path, run = tmp_path / "it.ckpt", trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(path)
    path.chmod(mode)
    run.save_checkpoint(path)
    assert S_IMODE(path.stat().st_mode) == mode


def test_a_full_disk_is_told_with_the_file(tmp_path):
    fitted = trainer(tmp_path, callbacks=[lora()])
    fitted.fit(Classifier(), loader())
    path = tmp_path / "full.ckpt"
    with no_file_beyond(100), pytest.raises(OSError, match="File too large") as error:
        fitted.save_checkpoint(path)
    assert error.value.filename == str(path)
    assert not path.exists()


class Words:
    """Something that reads a file when it is pickled."""

    def __reduce__(self):
        return str, (Path("words.txt").read_text(),)


def test_an_error_about_another_file_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = trainer(tmp_path, callbacks=[lora()])
    fitted.fit(module := Classifier(), loader())
    module.on_save_checkpoint = lambda checkpoint: checkpoint.update(words=Words())
    with pytest.raises(FileNotFoundError) as error:
        fitted.save_checkpoint(tmp_path / "run.ckpt")
    assert error.value.filename == "words.txt"


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path):
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / f"{'x' * 250}.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == [f"{'x' * 250}.ckpt"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_a_copy_of_a_trainer_saves_its_own_module(tmp_path, copied):
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(Classifier(), loader())
    other = copied(run)
    other.save_checkpoint(tmp_path / "adapted.ckpt")
    assert not differing(values(load_from_checkpoint(Classifier, tmp_path / "adapted.ckpt")), values(run.model))
    LoraModel(other.lightning_module).merge_and_unload()
    other.save_checkpoint(tmp_path / "merged.ckpt")
    assert not differing(load(tmp_path / "merged.ckpt")["state_dict"], values(other.lightning_module))
